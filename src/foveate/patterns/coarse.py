"""Patterns between a grid and a coarser one, whose tokens stand for boxes (cells) of it.

Along an axis, position i lies in cell i // cell. `Around` lets a token see the coarse tokens of its own cell
and of the cells up to `reach` further; `Within` is its transpose, and lets a coarse token see the tokens of
those cells. The last cell of an axis is smaller when sizes don't divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule
from foveate.patterns.pattern import Padded, Pattern, check_int

GridLike = Grid | int | Sequence[int]


class _Coarse(Pattern):
    """What the patterns of this file share: the two grids and their arguments."""

    grid: Grid
    cell: tuple[int, ...]
    reach: int
    coarse: Grid

    def _set(self, grid: GridLike, cell: int | Sequence[int], reach: int) -> None:
        grid = Grid.of(grid)
        cells = grid.per_axis(cell, "cell")
        if min(cells) < 1:
            raise bad("cell", cell, "integers >= 1")
        check_int(reach, "reach", 0)
        counts = [-(-n // c) for n, c in zip(grid, cells, strict=True)]
        self._store(grid=grid, cell=tuple(cells), reach=reach, coarse=Grid(*counts))

    def _near(self, fine: Tensor, coarse: Tensor, fine_grid: Grid, coarse_grid: Grid, lo: int) -> Tensor:
        out = None
        at = zip(fine_grid.unravel(fine), coarse_grid.unravel(coarse), self.cell, strict=True)
        for i, j, cell in at:
            near = (i // cell - (j - lo)).abs() <= self.reach
            out = near if out is None else out & near
        assert out is not None
        return out


class Around(_Coarse):
    """Each token of a grid sees the coarse tokens at most `reach` cells away from its own, along every axis.

    Queries are the `grid.numel` tokens, keys the `coarse.numel` coarse ones.

    Args:
        grid: geometry of the queries.
        cell: tokens of a cell, per axis.
        reach: how many cells further a token sees, >= 0.
        border: "mask": coarse tokens outside do not exist; "zero": they are phantoms with k = v = 0 that count
            in the denominator (super tokens, arXiv 2211.11167).

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    fields = ("grid", "cell", "reach", "border")
    border: Literal["mask", "zero"]

    def __init__(
        self,
        grid: GridLike,
        cell: int | Sequence[int],
        reach: int = 1,
        border: Literal["mask", "zero"] = "mask",
    ):
        if border not in ("mask", "zero"):
            raise bad("border", border, "'mask' or 'zero'")
        self._set(grid, cell, reach)
        self._store(border=border)

    @property
    def tokens(self) -> int:
        """The number of queries."""
        return self.grid.numel

    def _default_n_k(self, n_q: int) -> int:
        return self.coarse.numel

    @property
    def has_phantoms(self) -> bool:
        """Whether coarse tokens outside the grid take part as zeros."""
        return self.border == "zero" and self.reach > 0

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless the lengths are those of the two grids."""
        super().check(n_q, n_k)
        self.grid.check_tokens(n_q, "n_q")
        self.coarse.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Compare cells, axis by axis."""
        return self._near(q, k, self.grid, self.coarse, 0)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        rules = []
        for length, cell, count in zip(self.grid, self.cell, self.coarse, strict=True):
            own = torch.arange(length) // cell
            first = (own - self.reach).clamp(min=0)
            stop = (own + self.reach + 1).clamp(max=count)
            rules.append(AxisRule(length, count, first, stop - first))
        return tuple(rules)

    def phantoms(self, n_q: int | None = None) -> int:
        """Count the (query, phantom) pairs."""
        self.lengths(n_q)
        if not self.has_phantoms:
            return 0
        real, every = 1, 1
        for rule in self._axes(self.grid.numel, self.coarse.numel):
            real, every = real * rule.pairs, every * rule.n_q * (2 * self.reach + 1)
        return every - real

    def padded(self) -> Padded | None:
        """Return the pattern over the coarse grid with `reach` phantoms on every side."""
        if not self.has_phantoms:
            return None
        pattern = PaddedAround(self.grid, self.cell, self.reach)
        side = (self.reach,) * self.grid.ndim
        return Padded(pattern=pattern, key_grid=pattern.key_grid, lo=side, hi=side)


class PaddedAround(_Coarse):
    """`Around` with a zero border, over the padded coarse grid, where phantoms are ordinary keys.

    Made by `Around.padded`; arguments as there.
    """

    fields = ("grid", "cell", "reach")
    key_grid: Grid

    def __init__(self, grid: GridLike, cell: int | Sequence[int], reach: int = 1):
        self._set(grid, cell, reach)
        self._store(key_grid=Grid(*(n + 2 * reach for n in self.coarse)))

    @property
    def tokens(self) -> int:
        """The number of queries."""
        return self.grid.numel

    def _default_n_k(self, n_q: int) -> int:
        return self.key_grid.numel

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless the lengths are those of the grid and the padded coarse grid."""
        super().check(n_q, n_k)
        self.grid.check_tokens(n_q, "n_q")
        self.key_grid.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Compare cells at key coordinates of the padded coarse grid."""
        return self._near(q, k, self.grid, self.key_grid, self.reach)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        rules = []
        for length, cell, count in zip(self.grid, self.cell, self.key_grid, strict=True):
            first = torch.arange(length) // cell
            rules.append(AxisRule(length, count, first, torch.full((length,), 2 * self.reach + 1)))
        return tuple(rules)


class Within(_Coarse):
    """Each coarse token sees the tokens of the cells at most `reach` away from its own: `Around` transposed.

    Queries are the `coarse.numel` coarse tokens, keys the `grid.numel` tokens. There are no phantoms: what a
    token gave to one outside is lost.

    Args:
        grid: geometry of the keys.
        cell: tokens of a cell, per axis.
        reach: how many cells further a coarse token sees, >= 0.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    fields = ("grid", "cell", "reach")

    def __init__(self, grid: GridLike, cell: int | Sequence[int], reach: int = 1):
        self._set(grid, cell, reach)

    @property
    def tokens(self) -> int:
        """The number of queries."""
        return self.coarse.numel

    def _default_n_k(self, n_q: int) -> int:
        return self.grid.numel

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless the lengths are those of the two grids."""
        super().check(n_q, n_k)
        self.coarse.check_tokens(n_q, "n_q")
        self.grid.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Compare cells, axis by axis."""
        return self._near(k, q, self.grid, self.coarse, 0)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        rules = []
        for length, cell, count in zip(self.grid, self.cell, self.coarse, strict=True):
            own = torch.arange(count)
            first = ((own - self.reach) * cell).clamp(min=0)
            stop = ((own + self.reach + 1) * cell).clamp(max=length)
            rules.append(AxisRule(count, length, first, stop - first))
        return tuple(rules)
