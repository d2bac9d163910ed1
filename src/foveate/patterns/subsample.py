"""`Subsampled`: a grid pattern asked by fewer queries, every `stride`-th one along each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule
from foveate.patterns.grids import GridPattern, PaddedGrid
from foveate.patterns.pattern import Padded, Pattern


class Subsampled(Pattern):
    """The queries at positions 0, stride, 2 stride, ... of every axis see the keys they see in `where`.

    Attention that downsamples its map (HaloNet's strided queries, arXiv 2103.12731). There are
    `query_grid.numel` queries, ceil(length / stride) along an axis, and as many keys as in `where`.

    Args:
        where: a pattern on a grid.
        stride: distance between neighbouring queries, >= 1, one integer or one per axis.

    Raises:
        ArgumentError: naming `where` or `stride`.
    """

    fields = ("where", "stride")
    where: GridPattern | PaddedGrid
    stride: tuple[int, ...]
    query_grid: Grid

    def __init__(self, where: GridPattern | PaddedGrid, stride: int | Sequence[int]):
        if not isinstance(where, GridPattern | PaddedGrid):
            raise bad("where", where, "a pattern on a grid, such as Halo(...)")
        strides = where.grid.per_axis(stride, "stride")
        if min(strides) < 1:
            raise bad("stride", stride, "integers >= 1")
        sizes = [-(-length // step) for length, step in zip(where.grid, strides, strict=True)]
        self._store(where=where, stride=tuple(strides), query_grid=Grid(*sizes))

    @property
    def tokens(self) -> int:
        """The number of queries; there are more keys."""
        return self.query_grid.numel

    def _default_n_k(self, n_q: int) -> int:
        return self.where._default_n_k(self.where.grid.numel)

    @property
    def has_phantoms(self) -> bool:
        """Whether keys outside the grid take part as zeros."""
        return self.where.has_phantoms

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless `n_q` is the query grid's size and `n_k` fits `where`."""
        super().check(n_q, n_k)
        self.query_grid.check_tokens(n_q, "n_q")
        self.where.check(self.where.grid.numel, n_k)

    def _ids(self, q: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the ids that queries have in `where`."""
        coords = zip(self.query_grid.unravel(q), self.stride, strict=True)
        return self.where.grid.ravel([at * step for at, step in coords])

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Ask `where` for the query at `stride` times the coordinates."""
        return self.where.allowed(self._ids(q), k, self.where.grid.numel, n_k)

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Return the candidates of `where`."""
        return self.where.candidates(self._ids(q_ids.cpu()), self.where.grid.numel, n_k)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...] | None:
        rules = self.where.axes(self.where.grid.numel, n_k)
        # Where keys step too, a query's class is no longer told by its position: see AxisRule's invariants.
        if rules is None or any(rule.step > 1 and s > 1 for rule, s in zip(rules, self.stride, strict=True)):
            return None
        return tuple(_every(rule, step) for rule, step in zip(rules, self.stride, strict=True))

    def phantoms(self, n_q: int | None = None) -> int:
        """Count the (query, phantom key) pairs of the queries that are left."""
        self.lengths(n_q)
        if not self.has_phantoms:
            return 0
        real = every = 1
        for axis, length, step in zip(self.where.local, self.where.grid, self.stride, strict=True):
            real *= _every(axis.rule(length, length), step).pairs
            every *= _every(axis.padded_rule(length), step).pairs
        return every - real

    def padded(self) -> Padded | None:
        """Return the pattern over the padded key grid when it has phantoms, else None."""
        wide = self.where.padded()
        if wide is None:
            return None
        assert isinstance(wide.pattern, PaddedGrid)
        return replace(wide, pattern=Subsampled(wide.pattern, self.stride))


def _every(rule: AxisRule, step: int) -> AxisRule:
    start, count = rule.start[::step], rule.count[::step]
    return AxisRule(math.ceil(rule.n_q / step), rule.n_k, start, count, rule.step, rule.phase)
