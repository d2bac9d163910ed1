"""Paths: orders in which a scan visits every cell of a map once. Index permutations, integers only.

A `Path` over a grid of h x w cells holds `order`, where `order[t]` is the row-major id of the cell visited at
step t, and its inverse. Every function here works for all h, w >= 1; the walks are written as one sort key per
cell, so that nothing loops over cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid


class Path:
    """One order of the cells of a grid. Equal when grid and order are equal; never changed after it is made.

    Args:
        grid: the grid walked over.
        order: (N,) integer ids, every cell of the grid exactly once.

    Raises:
        ArgumentError: naming `order`, when it is no permutation of the grid's cells.
    """

    __slots__ = ("grid", "inverse", "order")
    grid: Grid
    order: Int[Tensor, "n"]
    inverse: Int[Tensor, "n"]

    def __init__(self, grid: Grid, order: Int[Tensor, "n"]):
        n = grid.numel
        if order.shape != (n,) or order.dtype != torch.int64:
            raise bad("order", (tuple(order.shape), order.dtype), f"({n},) int64 ids for {grid}")
        # Values cannot be looked at while compiling; the walks below are right anyway.
        if not torch.compiler.is_compiling() and not bool(
            (order.sort().values == torch.arange(n, device=order.device)).all()
        ):
            raise bad("order", order.tolist()[:8], f"every id from 0 to {n - 1} exactly once")
        self.grid, self.order = grid, order
        self.inverse = torch.argsort(order)

    def reversed(self) -> Path:
        """The same walk from its end to its start."""
        return Path(self.grid, self.order.flip(0))

    def mirrored(self, axis: int) -> Path:
        """The walk as seen in a mirror that turns `axis` around (-1 or 1: columns, 0: rows)."""
        ids = torch.arange(self.grid.numel, device=self.order.device).view(self.grid.sizes).flip(axis)
        return Path(self.grid, ids.flatten()[self.order])

    def __len__(self) -> int:
        return self.grid.numel

    def __eq__(self, other) -> bool:
        return isinstance(other, Path) and self.grid == other.grid and torch.equal(self.order, other.order)

    def __hash__(self) -> int:
        return hash(("Path", self.grid, tuple(self.order.tolist())))

    def __repr__(self) -> str:
        start = ", ".join(map(str, self.order[:6].tolist()))
        return f"Path({self.grid}, [{start}{', ...' if len(self) > 6 else ''}])"


@lru_cache(maxsize=256)
def raster(grid: Grid) -> Path:
    """Row after row, each from its start: the order of the tokens themselves. Grids of any number of axes."""
    return Path(grid, torch.arange(grid.numel))


@lru_cache(maxsize=256)
def columns(grid: Grid) -> Path:
    """Column after column, each from the top."""
    i, j = _cells(grid)
    return _sorted(grid, j * grid[0] + i)


@lru_cache(maxsize=256)
def snake(grid: Grid, axis: int = 1) -> Path:
    """Back and forth without a jump: along the rows (`axis=1`), or along the columns (`axis=0`).

    Raises:
        ArgumentError: naming `grid` or `axis`.
    """
    i, j = _cells(grid)
    h, w = grid
    if axis == 1:
        return _sorted(grid, i * w + torch.where(i % 2 == 0, j, w - 1 - j))
    if axis == 0:
        return _sorted(grid, j * h + torch.where(j % 2 == 0, i, h - 1 - i))
    raise bad("axis", axis, "1 (along the rows) or 0 (along the columns)")


@lru_cache(maxsize=256)
def diagonal(grid: Grid) -> Path:
    """Anti-diagonals from the top left corner, alternately upwards and downwards (the zig-zag of JPEG)."""
    i, j = _cells(grid)
    k = i + j
    return _sorted(grid, k * sum(grid) + torch.where(k % 2 == 0, j, i))


@lru_cache(maxsize=256)
def spiral(grid: Grid) -> Path:
    """Clockwise from the top left corner inwards, ring after ring."""
    i, j = _cells(grid)
    h, w = grid
    ring = torch.stack([i, j, h - 1 - i, w - 1 - j]).amin(0)
    y, x, last_y, last_x = i - ring, j - ring, h - 1 - 2 * ring, w - 1 - 2 * ring
    step = 2 * last_x + 2 * last_y - y  # up the left side, unless on one of the other three
    step = torch.where(y == last_y, 2 * last_x + last_y - x, step)
    step = torch.where(x == last_x, last_x + y, step)
    step = torch.where(y == 0, x, step)
    return _sorted(grid, ring * 2 * (h + w) + step)


@lru_cache(maxsize=256)
def polyline(grid: Grid) -> Path:
    """Nested L shapes around the top left corner, each walked in the other sense than the one before.

    The L number m holds the cells with max(row, column) = m: its stretch of column m and its stretch of row m.
    """
    i, j = _cells(grid)
    m = torch.maximum(i, j)
    along = torch.where(j == m, i, 2 * m - j)
    return _sorted(grid, m * 2 * sum(grid) + torch.where(m % 2 == 0, along, 2 * m - along))


def both_ways(*paths: Path) -> tuple[Path, ...]:
    """Every path, then every path from its end: (p, q) gives (p, q, p reversed, q reversed)."""
    return (*paths, *(path.reversed() for path in paths))


@lru_cache(maxsize=256)
def cross(grid: Grid) -> tuple[Path, ...]:
    """The four directions of a cross scan: rows, columns, and both from their ends."""
    return both_ways(raster(grid), columns(grid))


def orders(paths: Sequence[Path], device: torch.device | str | None = None) -> Int[Tensor, "p n"]:
    """The orders of several paths over one grid, one row each.

    Raises:
        ArgumentError: naming `paths`, when there are none or their grids differ.
    """
    return torch.stack([path.order for path in _together(paths)]).to(device)


def inverses(paths: Sequence[Path], device: torch.device | str | None = None) -> Int[Tensor, "p n"]:
    """The inverse orders of several paths over one grid, one row each; errors as in `orders`."""
    return torch.stack([path.inverse for path in _together(paths)]).to(device)


def _together(paths: Iterable[Path]) -> list[Path]:
    listed = list(paths)
    if not listed or any(path.grid != listed[0].grid for path in listed):
        raise bad("paths", [path.grid for path in listed], "at least one path, all over the same grid")
    return listed


def _cells(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of every cell, in token order."""
    if grid.ndim != 2:
        raise bad("grid", grid, "a grid with 2 axes")
    i, j = grid.unravel(torch.arange(grid.numel))
    return i, j


def _sorted(grid: Grid, key: Tensor) -> Path:
    """The path that visits cells by increasing key; keys are distinct."""
    return Path(grid, torch.argsort(key))
