"""Patterns that look at how far keys stand from queries: along the axes of a grid, or in spans of a sequence.

`Offsets` unites to axial attention, crosses, past rows, next columns; `Spans` is what coarse keys (one per span of
tokens) and coarse queries need: who is in my span, in the one before it, in any earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule
from foveate.patterns.pattern import Pattern, check_int

Reach = tuple[int | None, int | None]


class Offsets(Pattern):
    """Keys whose offset (key coordinate - query coordinate) lies in a range, on every axis of a grid.

    `Offsets(grid, [(0, 0), (None, None)])` is the query's row, `Offsets(grid, [(None, -1), (0, 0)])` what stands
    above it in its column, `Offsets(grid, [(-1, -1), (None, None)])` the row before.

    Args:
        grid: geometry of queries and keys.
        reach: (lowest, highest) offset per axis, both included; None is no bound.

    Raises:
        ArgumentError: naming `reach`, unless it has one pair per axis.
    """

    fields = ("grid", "reach")
    grid: Grid
    reach: tuple[Reach, ...]

    def __init__(self, grid: Grid | int | Sequence[int], reach: Sequence[Reach]):
        grid = Grid.of(grid)
        pairs = tuple(tuple(pair) for pair in reach)
        if len(pairs) != grid.ndim or any(len(pair) != 2 for pair in pairs):
            raise bad("reach", reach, f"{grid.ndim} pairs (lowest, highest) for {grid}")
        for pair in pairs:
            _check_bounds(pair, "reach", reach)
        self._store(grid=grid, reach=pairs)

    @property
    def tokens(self) -> int:
        """The number of tokens of the grid."""
        return self.grid.numel

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless both lengths are the grid's."""
        super().check(n_q, n_k)
        self.grid.check_tokens(n_q, "n_q")
        self.grid.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """AND of the axes."""
        seen = (q >= 0) & (k >= 0)
        for (low, high), i, j in zip(self.reach, self.grid.unravel(q), self.grid.unravel(k), strict=True):
            if low is not None:
                seen = seen & (j - i >= low)
            if high is not None:
                seen = seen & (j - i <= high)
        return seen

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        rules = []
        for length, (low, high) in zip(self.grid, self.reach, strict=True):
            i = torch.arange(length)
            rules.append(_rule(i, low, high, 1, length))
        return tuple(rules)

    def _shown_arguments(self) -> list[str]:
        return [repr(self.grid), repr(self.reach)]


class Spans(Pattern):
    """Queries and keys in spans of equal length: query i stands in span i // query, key j in span j // key.

    A query sees the keys of the spans whose number differs from its own by `low` to `high`. With as many spans on
    both sides, `Spans(1, 8)` gives each of N / 8 coarse queries the 8 tokens it stands for, and
    `Spans(8, 1, None, -1)` gives each of N tokens the coarse keys of all earlier spans.

    Args:
        query: queries of a span, >= 1; the last span may be shorter.
        key: keys of a span, >= 1.
        low: lowest difference of span numbers (key's - query's), None for no bound.
        high: highest difference.

    Raises:
        ArgumentError: naming the argument that makes no sense.
    """

    fields = ("query", "key", "low", "high")
    query: int
    key: int
    low: int | None
    high: int | None

    def __init__(self, query: int, key: int, low: int | None = 0, high: int | None = 0):
        _check_bounds((low, high), "low, high", (low, high))
        self._store(query=check_int(query, "query", 1), key=check_int(key, "key", 1), low=low, high=high)

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Compare the numbers of the spans."""
        off, seen = k // self.key - q // self.query, (q >= 0) & (k >= 0)
        if self.low is not None:
            seen = seen & (off >= self.low)
        return seen if self.high is None else seen & (off <= self.high)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return (_rule(torch.arange(n_q) // self.query, self.low, self.high, self.key, n_k),)


def _rule(span: Int[Tensor, "n_q"], low: int | None, high: int | None, key: int, n_k: int) -> AxisRule:
    """Tabulate the keys of spans `span + low .. span + high`, `key` keys each."""
    start = torch.zeros_like(span) if low is None else ((span + low) * key).clamp(0, n_k)
    stop = torch.full_like(span, n_k) if high is None else ((span + high + 1) * key).clamp(0, n_k)
    return AxisRule(len(span), n_k, start, (stop - start).clamp(min=0))


def _check_bounds(pair: Sequence[int | None], name: str, shown: object) -> None:
    for bound in pair:
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise bad(name, shown, "integers, or None for no bound")
    if pair[0] is not None and pair[1] is not None and pair[0] > pair[1]:
        raise bad(name, shown, "the lower bound first")
