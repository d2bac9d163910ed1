"""Wall-clock times of several callables, taken turn about so that a drifting machine hurts them alike.

One round runs every callable once, in an order that rotates from round to round; the figure reported is
the median over rounds, its spread the distance between the quartiles. The clock is read only after the
device has finished its queue.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.core.errors import bad


@dataclass(frozen=True)
class Timing:
    """Times of one callable.

    Attributes:
        samples_ms: one wall-clock time per repeat, in the order they were taken.
    """

    samples_ms: tuple[float, ...]

    def _quantile(self, share: float) -> float:
        ordered = sorted(self.samples_ms)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def median_ms(self) -> float:
        """The middle of the samples."""
        return self._quantile(0.5)

    @property
    def spread_ms(self) -> float:
        """Interquartile range: the width that holds the middle half of the samples."""
        return self._quantile(0.75) - self._quantile(0.25)

    @property
    def repeats(self) -> int:
        """How many samples there are."""
        return len(self.samples_ms)


@dataclass(frozen=True)
class Timed:
    """Something to time: `run(prepare())`, of which only `run` is on the clock."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None


@dataclass
class Interleaved:
    """What `time_interleaved` returns: `times` of those that ran, `errors` (the exception) of the others."""

    times: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


def synchronize(device: str | torch.device) -> None:
    """Wait until everything queued on `device` is done; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's garbage collector off the clock."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _once(call: Timed, device: str | torch.device) -> float:
    """Run one callable once and return its milliseconds."""
    prepared = () if call.prepare is None else (call.prepare(),)
    synchronize(device)
    start = time.perf_counter()
    result = call.run(*prepared)
    synchronize(device)
    elapsed = (time.perf_counter() - start) * 1e3
    del result
    return elapsed


def time_interleaved(
    calls: Mapping[str, Callable[[], Any] | Timed],
    *,
    warmup: int = 1,
    min_repeats: int = 3,
    max_repeats: int = 15,
    budget_s: float = float("inf"),
    device: str | torch.device = "cpu",
    on_round: Callable[[int], None] | None = None,
) -> Interleaved:
    """Time several callables in turn.

    Args:
        calls: name -> callable without arguments, or `Timed` for one with preparation off the clock.
        warmup: untimed runs of each before the first round.
        min_repeats: rounds that are always done, whatever the budget.
        max_repeats: rounds after which it ends.
        budget_s: no new round is begun (beyond `min_repeats`) that would likely pass this many seconds.
        device: where the work runs; decides what is waited for.
        on_round: called with the number of finished rounds.

    Returns:
        `Interleaved`. A callable that raises is left out from then on and its exception kept in `errors`.

    Raises:
        ArgumentError: for a repeat count below one or `max_repeats < min_repeats`.
    """
    if min_repeats < 1:
        raise bad("min_repeats", min_repeats, "at least 1")
    if max_repeats < min_repeats:
        raise bad("max_repeats", max_repeats, f"at least min_repeats={min_repeats}")
    plan = {name: call if isinstance(call, Timed) else Timed(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in plan}
    found = Interleaved()

    def attempt(name: str) -> float | None:
        try:
            return _once(plan[name], device)
        except Exception as error:  # one mechanism's failure must not cost the others their figures
            found.errors[name] = error
            return None

    begin = time.perf_counter()
    with _no_collector():
        for name in plan:
            for _ in range(warmup):
                if attempt(name) is None:
                    break
        for repeat in range(max_repeats):
            spent = time.perf_counter() - begin
            per_round = spent / max(repeat + warmup, 1)
            if repeat >= min_repeats and spent + per_round > budget_s:
                break
            alive = [name for name in plan if name not in found.errors]
            turn = repeat % max(len(alive), 1)
            for name in alive[turn:] + alive[:turn]:
                elapsed = attempt(name)
                if elapsed is not None:
                    samples[name].append(elapsed)
            if on_round is not None:
                on_round(repeat + 1)
    found.times = {
        name: Timing(tuple(taken)) for name, taken in samples.items() if taken and name not in found.errors
    }
    return found
