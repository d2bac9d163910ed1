"""`plan`: which backend runs a call, with which tile, and one sentence for every backend that does not.

A pure decision: no tensor work, and bare shapes are enough. `attend` obeys it and `explain` prints it.

The model that predicts times has four terms, with constants measured in fp32 on a 2-core x86 server. Only
their
ratios matter, and only where backends are close:

    time = pairs computed * (d + d_v) * per product  +  pairs computed * per pair
         + rows gathered * (d + d_v) * per number    +  calls * per call
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from foveate.core.errors import UnsupportedError, unknown
from foveate.core.lazy import cached_property
from foveate.core.tracing import fixed
from foveate.kernels import reference, sdpa, tiles
from foveate.kernels.constants import lowered, lowered_tile, static_counts
from foveate.kernels.cpu import backend as cpu
from foveate.kernels.flops import attention_backward_flops, attention_flops
from foveate.kernels.problem import Problem
from foveate.patterns.schedule import Schedule

# In the order in which equals are preferred. A backend is a module with NAME, refuse(problem), run(problem,
# plan); adding one is adding it here and giving it a price in `_price`.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (sdpa, cpu, tiles, reference)}

# Products of all pairs that forward and backward do together; dense attention does 7 (two forward; logits
# again, d weights, dv, dq and dk backward). A backend that visits pairs once for queries and once for keys
# does 9.
PRODUCTS: dict[str, int] = {"sdpa": 7, "cpu": 9, "tiles": 7, "reference": 6}
_DENSE_PRODUCTS = 7


@dataclass(frozen=True)
class Price:
    """Constants of the time model, in nanoseconds."""

    product: float
    pair: float
    row: float = 0.0
    call: float = 0.0


# sdpa: 4096 x 4096 pairs, 8 heads, d 64 took 215 ms; a mask is converted and read once per head.
SDPA = Price(product=0.0125, pair=0.0, call=10_000.0)
SDPA_MASK = Price(product=0.0, pair=0.35)
# tiles, fused: 400-key boxes of 64 queries took 1.9 ns a pair; strips are copied at 0.25 ns a number.
TILES_FUSED = Price(product=0.0138, pair=0.1, row=0.25, call=150_000.0)
# Plain ways pass over the logits about ten times.
TILES_PLAIN = Price(product=0.017, pair=4.5, row=0.25, call=400_000.0)
REFERENCE = Price(product=0.017, pair=6.0, call=100_000.0)
# Looking one pair up in a pattern, where a dense mask must be made from it (kept for the next call).
DENSE_MASK_PAIR = 0.2


@dataclass(frozen=True)
class Plan:
    """The decision about one call. Counts are over batch and query heads; `mask` tensors are not looked into.

    Attributes:
        backend: who runs it.
        reasons: backend -> one sentence on why it was not chosen.
        tile: queries of a cell per axis for backends that have cells, None = as the Schedule is.
        where: the problem's pattern or cells (phantoms resolved).
        batch, heads, n_q, n_k, d, d_v: sizes; n_k includes phantom keys.
        n_real: keys without phantoms.
        itemsize: bytes of one number.
        predicted_ms: time predicted for every backend that can; ratios of these decided.
        cells: the Schedule of routed cells, None for static patterns (see `schedule`).
        detail: how the backend runs here, "" where there is nothing to say (the core's instruction set).
    """

    backend: str
    reasons: dict[str, str]
    tile: tuple[int, ...] | None
    where: Any
    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    n_real: int
    d: int
    d_v: int
    itemsize: int
    predicted_ms: dict[str, float]
    cells: Schedule | None = None
    detail: str = ""

    @cached_property
    def schedule(self) -> Schedule | None:
        """The cells `where` lowers to, None without `where`."""
        if self.where is None:
            return None
        return self.cells if self.cells is not None else lowered(self.where, self.n_q, self.n_k, self.tile)

    @property
    def cell_tile(self) -> tuple[int, ...] | None:
        """Queries of a cell per axis, None where cells were given or are not used."""
        if not self.uses_cells or self.cells is not None:
            return None
        return self.tile or lowered_tile(self.where, self.n_q, self.n_k)

    def _times(self) -> int:
        """How often the counts of the schedule happen: its (b, h) against the problem's."""
        assert self.schedule is not None
        b, h = self.schedule.leading
        return (self.batch // max(b, 1)) * (self.heads // max(h, 1))

    @property
    def uses_cells(self) -> bool:
        """Whether the chosen backend visits only the cells of the schedule."""
        return self.schedule is not None and self.backend not in ("sdpa", "reference")

    @cached_property
    def pairs_needed(self) -> int:
        """Pairs that `where` lets through (phantom keys included)."""
        if self.schedule is None:
            return self.pairs_dense
        return self.schedule.pairs_needed * self._times()

    @cached_property
    def pairs_computed(self) -> int:
        """Pairs the chosen backend multiplies."""
        if self.uses_cells:
            return self.schedule.pairs_computed * self._times()  # type: ignore[union-attr]
        return self.batch * self.heads * self.n_q * self.n_k

    @property
    def pairs_dense(self) -> int:
        """Pairs of dense attention on the same tokens."""
        return self.batch * self.heads * self.n_q * self.n_real

    @property
    def full_tiles(self) -> int:
        """Cells in which every pair counts (0 without a schedule)."""
        return 0 if self.schedule is None else self.schedule.full_cells * self._times()

    @property
    def partial_tiles(self) -> int:
        """Cells that need a mask (0 without a schedule)."""
        return 0 if self.schedule is None else self.schedule.partial_cells * self._times()

    @property
    def flops(self) -> int:
        """FLOPs of the forward."""
        return attention_flops(self.pairs_computed, self.d, self.d_v)

    @property
    def flops_backward(self) -> int:
        """FLOPs of the backward."""
        if self.backend == "reference":
            return attention_backward_flops(self.pairs_computed, self.d, self.d_v, recompute=False)
        passes = 2 if self.backend == "cpu" else 1
        return attention_backward_flops(self.pairs_computed, self.d, self.d_v, passes=passes)

    @cached_property
    def bytes(self) -> int:
        """Bytes the forward moves at least: q, k, v and the output once, and what cells gather of k and v."""
        queries = self.batch * self.heads * self.n_q * (self.d + self.d_v)
        keys = self.batch * self.kv_heads * self.n_k * (self.d + self.d_v)
        if self.uses_cells:
            gathered = sum(g.n_cells * g.tk for g in self.schedule.groups)  # type: ignore[union-attr]
            keys += self.batch * self.kv_heads * gathered * (self.d + self.d_v)
        return (queries + keys) * self.itemsize

    @property
    def speedup_bound(self) -> float:
        """How many times faster than dense attention the forward can be: pairs dense / pairs computed."""
        return self.pairs_dense / self.pairs_computed if self.pairs_computed else float("inf")

    @property
    def speedup_bound_backward(self) -> float:
        """The same for forward and backward together, with the products each of them needs."""
        return self.speedup_bound * _DENSE_PRODUCTS / PRODUCTS.get(self.backend, _DENSE_PRODUCTS)


_WATCHERS: list[list[Plan]] = []


@contextmanager
def watch_plans() -> Iterator[list[Plan]]:
    """Collect the plans that `attend` follows inside the `with` block, in order.

    What ran, beside what `explain` says would run. Compiled code does not plan when it runs and is not seen.
    """
    seen: list[Plan] = []
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        # By identity: lists of plans may be equal.
        _WATCHERS[:] = [w for w in _WATCHERS if w is not seen]


def tell_watchers(chosen: Plan) -> None:
    """Hand a plan that is about to run to everybody in `watch_plans`."""
    for seen in _WATCHERS:
        seen.append(chosen)


def plan(problem: Problem, backend: str = "auto", *, tile: tuple[int, ...] | None = None) -> Plan:
    """Decide which backend runs `problem`.

    Args:
        problem: a validated call; tensors are not read.
        backend: "auto" for the one predicted to be fastest, or a name.
        tile: queries of a cell per axis, for experiments; the backend's own choice by default.

    Raises:
        UnknownNameError: `backend` is not a name in BACKENDS; the nearest names are in the message.
        UnsupportedError: the named backend cannot serve the problem; its reason is in the message.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("backend", backend, [*BACKENDS, "auto"])
    schedule = problem.schedule
    reasons: dict[str, str] = {}
    predicted: dict[str, float] = {}
    tile = _tile(problem, tile)
    counts = _counts(problem, schedule, tile)
    for name, module in BACKENDS.items():
        reason = module.refuse(problem)
        if reason is None:
            predicted[name] = _price(name, problem, counts, tile) / 1e6
        else:
            reasons[name] = reason[0].upper() + reason[1:] + "."
    if backend != "auto" and backend in reasons:
        raise UnsupportedError(f"backend {backend!r} cannot serve this call: {reasons[backend]}")
    chosen = backend if backend != "auto" else _fastest(predicted)
    for name in BACKENDS:
        if name != chosen and name not in reasons:
            reasons[name] = _slower(name, chosen, predicted, backend)
    detail = ""
    if chosen == "cpu":
        tile, detail = tile or cpu.tile(problem), cpu.describe(problem.dtype)
    elif chosen == "tiles" and backend == "auto" and problem.device.type == "cpu":
        cpu.note_absence()
    return Plan(
        backend=chosen, reasons=reasons, tile=tile, where=problem.where, batch=problem.batch,
        heads=problem.heads, kv_heads=problem.kv_heads, n_q=problem.n_q, n_k=problem.n_k,
        n_real=problem.n_k if problem.frame is None else problem.frame.base.numel,
        d=problem.d, d_v=problem.d_v, itemsize=problem.dtype.itemsize, predicted_ms=predicted, cells=schedule,
        detail=detail,
    )  # fmt: skip


def _fastest(predicted: dict[str, float]) -> str:
    """Return the name with the least time, the first of equals."""
    best = ""
    # Not min(key=...): torch.compile cannot trace that where sizes are symbols.
    for name, time in predicted.items():
        if not best or time < predicted[best]:
            best = name
    return best


def _slower(name: str, chosen: str, predicted: dict[str, float], asked: str) -> str:
    if asked != "auto":
        return f"It could run, but backend={asked!r} was asked for."
    if name == "reference":
        return "It is the plain definition, made to be checked against and not to be fast."
    if torch.compiler.is_compiling():
        # Nobody reads a plan while compiling, and a time that depends on a symbol cannot be written.
        return f"Predicted to take longer than {chosen!r}."
    ratio = predicted[name] / max(predicted[chosen], 1e-9)
    return f"Predicted to take {ratio:.2g} times as long as {chosen!r}."


@dataclass(frozen=True)
class _Counts:
    """What the cells would cost, per (batch, head)."""

    pairs: int
    rows: int
    calls: int


def _tile(problem: Problem, tile: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if problem.where is None or problem.schedule is not None:
        return None
    return tile


def _counts(problem: Problem, schedule: Schedule | None, tile: tuple[int, ...] | None) -> _Counts | None:
    if problem.where is None:
        return None
    if schedule is None:
        return _Counts(*static_counts(problem.where, fixed(problem.n_q), fixed(problem.n_k), tile))
    every = max(1, schedule.leading[0] * schedule.leading[1])
    pairs = schedule.pairs_computed // every
    rows = sum(g.n_cells * g.tk for g in schedule.groups)
    # Looking rows up by index costs about ten times as much per number as copying strips.
    return _Counts(pairs, 10 * rows, len(schedule.groups))


def _price(name: str, problem: Problem, counts: _Counts | None, tile: tuple[int, ...] | None) -> float:
    """Predict the time of the forward, in nanoseconds."""
    times = problem.batch * problem.heads
    dense = problem.n_q * problem.n_k
    if name == "sdpa":
        pairs = dense // 2 if sdpa.is_causal(problem) else dense
        total = _total(SDPA, problem, times * pairs, 0, 1)
        if sdpa.needs_mask(problem):
            total += times * dense * SDPA_MASK.pair + dense * DENSE_MASK_PAIR
        return total
    if name == "reference":
        mask = dense * DENSE_MASK_PAIR if problem.where is not None else 0.0
        return _total(REFERENCE, problem, times * dense, 0, 1) + mask
    if name == "cpu":
        return cpu.nanoseconds(problem, tile)
    assert counts is not None
    price = TILES_FUSED if tiles.fusable(problem) is None else TILES_PLAIN
    rows = problem.batch * problem.kv_heads * counts.rows
    return _total(price, problem, times * counts.pairs, rows, counts.calls)


def _total(price: Price, problem: Problem, pairs: int, rows: int, calls: int) -> float:
    width = problem.d + problem.d_v
    half = 0.5 if problem.dtype in (torch.bfloat16, torch.float16) else 1.0
    return pairs * (width * price.product * half + price.pair) + rows * width * price.row + calls * price.call
