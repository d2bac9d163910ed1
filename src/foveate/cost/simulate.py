"""Which stride of a neighborhood to choose: the simulator of generalized neighborhood attention over many tilings.

Kernels compute whole tiles. A stride that lines windows up with the tiles of keys wastes less of them, but lets more
queries share a window. `worth_choosing` looks at strides and shapes of tiles, and keeps the strides for which no
other that lets as many queries or fewer share a window promises a higher speed-up (arXiv 2504.16922).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.mechanisms.local.generalized_neighborhood import Simulation, axis_visits, simulate
from foveate.patterns.grids import Neighborhood

# Queries and keys of a tile in the published kernels: Hopper's, and Blackwell's.
TILE_SIZES = ((128, 128), (256, 128))
# Strides tried along an axis at most; longer windows are sampled.
MAX_STRIDES = 4096

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StrideChoice:
    """A stride, the shapes of tiles it is best with, and what it promises.

    Attributes:
        stride: tokens that share a window, per axis.
        query_tile: queries of a tile, per axis.
        key_tile: keys of a tile, per axis.
        result: tiles visited, those of dense attention, and whether every visited tile is needed entirely.
    """

    stride: Shape
    query_tile: Shape
    key_tile: Shape
    result: Simulation

    @property
    def bound(self) -> float:
        """Upper bound of the speed-up over dense attention with the same tiles."""
        return self.result.bound

    @property
    def sparsity(self) -> float:
        """Part of the dense tiles that is skipped."""
        return 1 - self.result.visited / self.result.dense


def tile_shapes(grid: Grid, size: int) -> list[Shape]:
    """Return the ways to spread a tile of `size` tokens (a power of two) over the axes, in powers of two.

    No side is longer than its axis rounded up to a power of two, unless the whole grid is smaller than the tile.
    """
    exponent = size.bit_length() - 1
    limits = [math.ceil(math.log2(length)) for length in grid]
    spread = min(exponent, sum(limits))
    ways = itertools.product(*(range(limit + 1) for limit in limits))
    return [tuple(2**e for e in way) for way in ways if sum(way) == spread]


def worth_choosing(
    where: Neighborhood,
    *,
    tile_sizes: Sequence[tuple[int, int]] = TILE_SIZES,
    query_tile: int | Sequence[int] | None = None,
    key_tile: int | Sequence[int] | None = None,
    any_stride: bool = True,
) -> dict[str, list[StrideChoice]]:
    """Return the strides worth choosing for a neighborhood, from stride 1 up to the fastest.

    Args:
        where: grid, window, dilation and causality; its stride counts only with `any_stride=False`.
        tile_sizes: (queries, keys) of a tile; every shape of theirs is tried.
        query_tile, key_tile: given shapes instead, one size per axis (both or neither).
        any_stride: whether to look for strides; else only the stride of `where` is judged, by its best tiling.

    Returns:
        One list per entry of `tile_sizes` (or for the given shapes), named "queries/keys"; strides that more
        queries share come later, and every one has a higher bound than those before it.

    Raises:
        ArgumentError: naming `query_tile` or `key_tile`.
    """
    dealt = Grid(*(-(-length // d) for length, d in zip(where.grid, where.dilation, strict=True)))
    if (query_tile is None) != (key_tile is None):
        raise bad("query_tile, key_tile", (query_tile, key_tile), "both or neither")
    if query_tile is not None and key_tile is not None:
        simulate(where, query_tile, key_tile)  # for its errors
        shapes = [where.grid.per_axis(tile, "tile") for tile in (query_tile, key_tile)]
        pairs = {f"{_text(shapes[0])}/{_text(shapes[1])}": ([shapes[0]], [shapes[1]])}
    else:
        pairs = {f"{q}/{k}": (tile_shapes(dealt, q), tile_shapes(dealt, k)) for q, k in tile_sizes}
    search = _Search(where, any_stride)
    return {name: search.front(*shapes) for name, shapes in pairs.items()}


class _Search:
    """Tables per axis, shared by all tilings: a product of axes has the product of their counts."""

    def __init__(self, where: Neighborhood, any_stride: bool):
        self.where, self.any_stride = where, any_stride
        self._rules: dict[Any, Any] = {}
        self._fronts: dict[Any, list[tuple[int, int, int, bool]]] = {}

    def front(self, query_tiles: list[Shape], key_tiles: list[Shape]) -> list[StrideChoice]:
        """Return the strides worth choosing, each with its best tiling."""
        best: dict[Shape, tuple[float, bool, Shape, Shape, Simulation]] = {}
        for q, k in itertools.product(query_tiles, key_tiles):
            axes = [self._axis(a, q[a], k[a]) for a in range(self.where.grid.ndim)]
            for entries in itertools.product(*axes):
                stride = tuple(entry[0] for entry in entries)
                visited, dense = (math.prod(entry[i] for entry in entries) for i in (1, 2))
                found = Simulation(visited, dense, all(entry[3] for entry in entries))
                if stride not in best or (found.bound, found.perfect) > best[stride][:2]:
                    best[stride] = (found.bound, found.perfect, q, k, found)
        chosen, highest = [], 0.0
        order = sorted(
            best.items(), key=lambda item: (math.prod(item[0]), -item[1][0], max(item[0]), item[0])
        )
        for stride, (bound, _, q, k, found) in order:
            # Differences beyond the twelfth digit are those of division.
            if bound > highest * (1 + 1e-12):
                highest = bound
                chosen.append(StrideChoice(stride, q, k, found))
        return chosen

    def _axis(self, axis: int, tq: int, tk: int) -> list[tuple[int, int, int, bool]]:
        """Return (stride, visited, dense, perfect) of an axis, for strides that visit fewer tiles than smaller ones."""
        rule = (*(getattr(self.where, name)[axis] for name in ("grid", "window", "dilation", "causal")),)
        strides = tuple(_strides(rule[1])) if self.any_stride else (self.where.stride[axis],)
        key = (rule, strides[0], tq, tk)
        if key not in self._fronts:
            front, fewest = [], math.inf
            for stride in strides:
                seen, every, perfect = axis_visits(self._rule(rule, stride), rule[2], tq, tk)
                if seen < fewest:
                    fewest = seen
                    front.append((stride, seen, every, perfect))
                # Every query needs `window` keys whatever the stride: nothing visits less than what wastes nothing.
                # A causal one leaves out what comes after it, and how much that is depends on the stride.
                if perfect and not rule[3]:
                    break
            self._fronts[key] = front
        return self._fronts[key]

    def _rule(self, axis: tuple[int, int, int, bool], stride: int) -> Any:
        if (axis, stride) not in self._rules:
            length, window, dilation, causal = axis
            pattern = Neighborhood(Grid(length), window, dilation, stride, causal)
            self._rules[axis, stride] = pattern._axes(length, length)[0]
        return self._rules[axis, stride]


def _strides(window: int) -> Iterator[int]:
    step = -(-window // MAX_STRIDES)
    yield 1
    yield from range(step if step > 1 else 2, window + 1, step)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def in_reach(where: Neighborhood) -> str:
    """Say how much faster than dense attention the neighborhood could be if no tile were wasted."""
    needed = math.prod(rule.pairs for rule in where.axes() or ())
    dense = where.grid.numel**2
    return f"{where!r} needs {needed / dense:.2%} of the dense pairs: {dense / needed:.3g}x is in reach"


def as_rich(found: dict[str, list[StrideChoice]]) -> Any:
    """Return the answer of `worth_choosing` as a table for rich."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tiles", "stride", "query tile", "key tile"):
        table.add_column(name, no_wrap=True)
    for name in ("skipped", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for name, choices in found.items():
        for choice in choices:
            shapes = (_text(s) for s in (choice.stride, choice.query_tile, choice.key_tile))
            note = "fully block-sparse" if choice.result.perfect else ""
            table.add_row(name, *shapes, f"{choice.sparsity:.1%}", f"{choice.bound:.4g}x", note)
    return table
