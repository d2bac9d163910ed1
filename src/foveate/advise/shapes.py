"""The workload `shapes`: time every mechanism at the user's own sizes, and at smaller ones for the exponent.

No learning. At each size all mechanisms are timed in turn, forward and backward, with the dense baseline
among them; then memory is measured and floating point operations are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.advise.admit import Admission, Site, one_line
from foveate.advise.crossover import crossed, price
from foveate.advise.events import Event, Listener
from foveate.advise.settings import BASELINE
from foveate.advise.svg import grid_words
from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.kernels.flops import count_flops
from foveate.measure.memory import peak_bytes
from foveate.measure.scaling import fit_exponent
from foveate.measure.store import empty_row
from foveate.measure.subject import Subject
from foveate.measure.timer import Interleaved, time_interleaved

WORKLOAD = "shapes"
MIN_REPEATS, MAX_REPEATS = 3, 15
# One mechanism may take so many times its share of the seconds at the user's own size.
LARGEST = 6.0


@dataclass
class Runner:
    """One mechanism on its way up the ladder of sizes."""

    admission: Admission
    points: list[dict[str, Any]]
    params: int = 0
    repeats: int = 0
    refused: bool = False
    fault: str = ""
    price: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in the registry."""
        return self.admission.facts.key


def _build(runner: Runner, site: Site, grid: Grid, seed: int) -> Subject | None:
    torch.manual_seed(seed)
    try:
        return site.build(runner.admission.facts, grid)
    except (ArgumentError, UnsupportedError):
        return None  # it takes the user's size, but not this smaller one: the exponent has a point less


def _measure_size(
    runners: list[Runner], site: Site, grid: Grid, *, batch: int, budget_s: float, seed: int, tick: Callable
) -> None:
    """Add one point to every runner that can do `grid`; a fault is noted on the runner."""
    subjects = {r.key: s for r in runners if not r.fault and (s := _build(r, site, grid, seed)) is not None}
    inputs = {k: s.sample(batch, dtype=site.dtype, seed=seed) for k, s in subjects.items()}
    calls: dict[str, Any] = {}
    for key, subject in subjects.items():
        calls[f"{key}/forward"] = subject.forward_call(inputs[key])
        calls[f"{key}/backward"] = subject.backward_call(inputs[key])
    ran = _backends(subjects, inputs) if grid == site.grid else {}
    for key, backends in ran.items():
        if "cpu" in backends:
            calls[f"{key}/tiles"] = subjects[key].forward_call_on(inputs[key], "tiles")
    found = time_interleaved(
        calls,
        min_repeats=MIN_REPEATS,
        max_repeats=MAX_REPEATS,
        budget_s=budget_s,
        device=site.device,
        on_round=lambda _: tick(),
    )
    by_key = {r.key: r for r in runners}
    for key, subject in subjects.items():
        tick()
        runner = by_key[key]
        try:
            point = _point(subject, found, inputs[key], site, batch)
        except Exception as error:
            runner.fault = f"at {grid_words(grid)}: {one_line(error)}"
            runner.refused = isinstance(error, ArgumentError | UnsupportedError)
            continue
        if key in ran:
            point["backends"] = ran[key]
        if f"{key}/tiles" in found.times:
            point["core_gain"] = found.times[f"{key}/tiles"].median_ms / point["forward_ms"]
        runner.params, runner.repeats = subject.params, found.times[f"{key}/forward"].repeats
        runner.points.append(point)
        runner.points.sort(key=lambda one: one["tokens"])


def _backends(subjects: dict[str, Subject], inputs: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """What each forward pass runs on; a mechanism that raises here will say why when it is timed."""
    found = {}
    for key, subject in subjects.items():
        with suppress(Exception):
            found[key] = subject.backends(inputs[key])
    return found


def _point(subject: Subject, found: Interleaved, x: torch.Tensor, site: Site, batch: int) -> dict[str, Any]:
    forward, backward = f"{subject.key}/forward", f"{subject.key}/backward"
    for name in (forward, backward):
        if name in found.errors:
            raise found.errors[name]
    with torch.no_grad():
        flops = count_flops(subject, x)
    return {
        "grid": list(subject.grid.sizes),
        "tokens": subject.grid.numel,
        "batch": batch,
        "forward_ms": found.times[forward].median_ms,
        "forward_spread_ms": found.times[forward].spread_ms,
        "backward_ms": found.times[backward].median_ms,
        "backward_spread_ms": found.times[backward].spread_ms,
        "memory_bytes": peak_bytes(lambda: subject.step(x), device=site.device),
        "flops": flops,
    }


def step_ms(point: dict[str, Any]) -> float:
    """Forward plus backward time of a point or row."""
    return point["forward_ms"] + point["backward_ms"]


def add_ratios(row: dict[str, Any], dense: dict[str, Any] | None) -> None:
    """Set speed-ups, bound, prediction and memory ratio of a row or point against full attention's."""
    if dense is None or row["forward_ms"] is None or dense["forward_ms"] is None:
        return
    row["speedup"] = step_ms(dense) / step_ms(row)
    row["speedup_forward"] = dense["forward_ms"] / row["forward_ms"]
    if row.get("flops") and dense.get("flops"):
        row["speedup_bound"] = dense["flops"] / row["flops"]
        row["predicted_ms"] = dense["forward_ms"] / row["speedup_bound"]
    if row.get("memory_bytes") and dense.get("memory_bytes"):
        row["memory_ratio"] = row["memory_bytes"] / dense["memory_bytes"]


def row_of(runner: Runner, dense: Runner | None) -> dict[str, Any]:
    """The row of a runner with the points it has; figures are those of its largest size."""
    said = runner.admission.facts_row
    reference = {p["tokens"]: p for p in dense.points} if dense is not None else {}
    for point in runner.points:
        add_ratios(point, reference.get(point["tokens"]))
    if runner.fault or not runner.points:
        reason = runner.fault or "the run ended before it was timed"
        status = "refused" if runner.refused else "failed"
        return empty_row(WORKLOAD, runner.key, status, reason, **said, points=runner.points)
    last = runner.points[-1]
    figures = {k: v for k, v in last.items() if k not in ("grid", "tokens", "batch")}
    exponent = fit_exponent(
        [p["tokens"] for p in runner.points],
        [step_ms(p) for p in runner.points],
        [p["forward_spread_ms"] + p["backward_spread_ms"] for p in runner.points],
    )
    slower = [grid_words(p["grid"]) for p in runner.points if p.get("speedup", 1.0) < 1.0]
    measured = {"crossover_measured": crossed(runner.points)} if runner.price else {}
    return empty_row(WORKLOAD, runner.key, "measured", **said) | figures | runner.price | measured | {
        "step_ms": step_ms(last),
        "params": runner.params,
        "repeats": runner.repeats,
        "exponent": exponent.value if exponent else None,
        "exponent_se": exponent.se if exponent else None,
        "points": runner.points,
        "slower_than_dense": [] if runner.key == BASELINE else slower,
    }  # fmt: skip


def sweep(
    admissions: list[Admission],
    site: Site,
    ladder: list[Grid],
    *,
    batch: int = 1,
    budget_s: float,
    put: Callable[[dict[str, Any]], None],
    emit: Listener,
    seed: int = 0,
) -> list[Grid]:
    """Time all mechanisms up a ladder of sizes.

    Args:
        admissions: those that take part.
        site: width, heads, device and dtype; its grid is the user's.
        ladder: sizes in rising order, the user's own last.
        batch: samples at once.
        budget_s: seconds. After the smallest size comes the user's own, which matters most; a mechanism that would
            take much more than its share there is left out with the reason. A size between them that would likely
            overrun the budget by a third is left out, with a note.
        put: takes each row, again after every size.
        emit: told of progress.
        seed: of parameters and inputs.

    Returns:
        The sizes that were measured.
    """
    runners = [Runner(a, [], price=price(a.facts, site)) for a in admissions]
    dense = next((r for r in runners if r.key == BASELINE), None)
    begin = time.perf_counter()
    order = [*ladder[:1], *ladder[:0:-1][:1], *ladder[1:-1]]
    # Work grows at least like the number of tokens, for the baseline like its square: in between.
    weights = [grid.numel**1.5 for grid in order]
    done: list[Grid] = []
    for i, grid in enumerate(order):
        spent = time.perf_counter() - begin
        left = budget_s - spent
        if i == 1:
            _leave_out(runners, grid, left)
        elif i and _owed(runners, grid) > 1.3 * left:
            sizes = ", ".join(grid_words(g) for g in order[i:])
            emit(Event("note", WORKLOAD, message=f"the time budget ended before {sizes}"))
            break
        share = weights[i] / sum(weights[i:])

        def tick(at: Grid = grid) -> None:
            gone = (time.perf_counter() - begin) / budget_s
            emit(Event("progress", WORKLOAD, min(gone, 0.99), f"timing {grid_words(at)}"))

        tick()
        _measure_size(
            runners, site, grid, batch=batch, budget_s=max(left * share * 0.7, 0.2), seed=seed, tick=tick
        )
        done.append(grid)
        for runner in runners:
            put(row_of(runner, dense))
    return sorted(done, key=lambda grid: grid.numel)


def _seconds(runner: Runner, grid: Grid) -> float:
    """Predict what a mechanism takes at another size: warm-up, rounds, memory and FLOPs.

    From its nearest point, growing between linear and quadratic: few mechanisms are dense, but those weigh most.
    """
    if not runner.points:
        return 0.0
    near = min(runner.points, key=lambda point: abs(math.log(point["tokens"] / grid.numel)))
    return step_ms(near) / 1e3 * (grid.numel / near["tokens"]) ** 1.6 * (MIN_REPEATS + 3)


def _owed(runners: list[Runner], grid: Grid) -> float:
    return sum(_seconds(runner, grid) for runner in runners if not runner.fault)


def _leave_out(runners: list[Runner], grid: Grid, left: float) -> None:
    """Note on a mechanism that it would take more than `LARGEST` times its share of the seconds left."""
    racing = [runner for runner in runners if not runner.fault]
    most = LARGEST * max(left, 0.0) / max(len(racing), 1)
    for runner in racing:
        seconds = _seconds(runner, grid)
        if seconds > most and runner.key != BASELINE:
            runner.fault = (
                f"left out at {grid_words(grid)}: about {seconds:.2g} s predicted, {most:.2g} s allowed"
            )
            runner.refused = True
