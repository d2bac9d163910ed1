"""Static candidates of `recall`: patterns that look at no content, sized to each budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.basic import BlockList, Sinks, SlidingWindow
from foveate.patterns.grids import Lattice, Neighborhood, Windows
from foveate.patterns.pattern import Pattern
from foveate.patterns.selection import Selection
from foveate.study.candidates import Router, Setting, family

Members = Iterator[tuple[str, Router]]
_SINKS = 4
# Block lists are written out pair by pair: at most this many blocks on a side.
_MOST_BLOCKS = 512


def _fixed(pattern: Pattern) -> tuple[str, Router]:
    return repr(pattern), lambda q, k: pattern


def _listed(setting: Setting, pattern: Pattern) -> Router:
    """Return a pattern of blocks; causal, its own cells are kept: tiles of other sizes would tear the blocks."""
    return lambda q, k: _joined(setting.n, [pattern]) if setting.causal else pattern


def _joined(n: int, parts: Sequence[Pattern]) -> Selection:
    """Unite patterns that share few cells: each keeps its own instead of being evaluated tile by tile."""
    whole = Selection.of_pattern(parts[0], n, n)
    for part in parts[1:]:
        whole = whole | part
    return whole


def _needs_axes(setting: Setting, low: int = 2) -> Grid:
    if setting.grid.ndim < low:
        raise bad("grid", setting.grid, f"at least {low} axes", "Name one, such as --grid 64x64.")
    return setting.grid


def _sides(grid: Grid, share: float) -> tuple[int, ...]:
    """Sizes of a box that holds about `share` of the tokens, in the proportions of the grid."""
    scale = share ** (1 / grid.ndim)
    return tuple(max(1, min(side, round(scale * side))) for side in grid)


@family("window", kind="static")
def windows(setting: Setting) -> Members:
    """Yield the nearest tokens of the sequence, before and after or before only."""
    for share in setting.budgets:
        rest = setting.keys(share) - 1
        yield _fixed(SlidingWindow(rest) if setting.causal else SlidingWindow(rest - rest // 2, rest // 2))


@family("window + sinks", kind="static")
def windows_and_sinks(setting: Setting) -> Members:
    """Yield the nearest tokens and the first four: StreamingLLM (arXiv 2309.17453)."""
    for share in setting.budgets:
        rest = max(0, setting.keys(share) - 1 - _SINKS)
        near = SlidingWindow(rest) if setting.causal else SlidingWindow(rest - rest // 2, rest // 2)
        yield _fixed(near | Sinks(_SINKS))


@family("dilated window", kind="static")
def dilated(setting: Setting) -> Members:
    """Yield as many tokens of the sequence as the window, four apart."""
    for share in setting.budgets:
        size = min(setting.keys(share), setting.n // 4)
        if size:
            yield _fixed(Neighborhood(setting.sequence, size, 4, causal=setting.causal))


@family("neighborhood", kind="static")
def neighborhoods(setting: Setting) -> Members:
    """Yield the nearest tokens of the grid (NATTEN's definition)."""
    grid = _needs_axes(setting)
    for share in setting.budgets:
        yield _fixed(Neighborhood(grid, _sides(grid, share)))


@family("strided neighborhood", kind="static")
def strided(setting: Setting) -> Members:
    """Yield neighborhoods shared by groups of queries, which cost least on hardware."""
    grid = _needs_axes(setting)
    for share in setting.budgets:
        sides = _sides(grid, share)
        yield _fixed(Neighborhood(grid, sides, stride=tuple(max(1, s // 2) for s in sides)))


@family("grid windows", kind="static")
def grid_windows(setting: Setting) -> Members:
    """Yield windows that do not overlap (Swin)."""
    grid = _needs_axes(setting)
    for share in setting.budgets:
        yield _fixed(Windows(grid, _sides(grid, share)))


@family("axial", kind="static")
def axial(setting: Setting) -> Members:
    """Yield the lines through a token along every axis; one size, whatever the budget."""
    grid = _needs_axes(setting)
    lines = [
        Windows(grid, tuple(side if axis == along else 1 for axis, side in enumerate(grid)))
        for along in range(grid.ndim)
    ]
    yield "axial", lambda q, k: _joined(setting.n, lines)


@family("near and far", kind="static")
def near_and_far(setting: Setting) -> Members:
    """Yield half of the budget as a neighborhood, half as a lattice over the whole grid."""
    grid = _needs_axes(setting)
    for share in setting.budgets:
        points = tuple(
            max(d for d in range(1, side + 1) if side % d == 0 and d <= max(1, wanted))
            for side, wanted in zip(grid, _sides(grid, share / 2), strict=True)
        )
        parts = [Neighborhood(grid, _sides(grid, share / 2)), Lattice(grid, points)]
        yield " | ".join(map(repr, parts)), lambda q, k, parts=parts: _joined(setting.n, parts)


def _block_of(setting: Setting, blocks_per_row: float, share: float) -> int:
    """Block size at which `blocks_per_row` blocks are `share` of the keys."""
    least = math.ceil(setting.n / _MOST_BLOCKS)
    return max(least, min(setting.n, round(share * setting.n / blocks_per_row)))


@family("powers of two", kind="static")
def powers_of_two(setting: Setting) -> Members:
    """Yield blocks at distances 0, 1, 2, 4, 8, ... blocks: LogSparse (arXiv 1907.00235), PowerAttention."""
    for share in setting.budgets:
        # The number of distances depends on the block, the block on the number of distances.
        block = max(1, round(share * setting.n / 8))
        for _ in range(8):
            distances = math.log2(max(2, setting.n / block)) * (1 if setting.causal else 2)
            block = _block_of(setting, distances, share)
        count = math.ceil(setting.n / block)
        reach = [0, *(1 << i for i in range(count.bit_length()))]
        pairs = {(i, i - d) for i in range(count) for d in reach if i >= d}
        if not setting.causal:
            pairs |= {(j, i) for i, j in pairs}
        yield f"BlockList({block}, distances 0, 1, 2, 4, ...)", _listed(setting, BlockList(block, pairs))


@family("local + global + random blocks", kind="static")
def random_blocks(setting: Setting) -> Members:
    """Yield three blocks around the query's, the first one, and as many random ones: BigBird (2007.14062)."""
    generator = torch.Generator().manual_seed(0)
    for share in setting.budgets:
        block = _block_of(setting, 8, share)
        count = math.ceil(setting.n / block)
        pairs = {(i, j) for i in range(count) for j in (i - 1, i, i + 1, 0) if 0 <= j < count}
        if not setting.causal:
            pairs |= {(0, j) for j in range(count)}
        for i in range(count):
            drawn = torch.randint(i + 1 if setting.causal else count, (4,), generator=generator)
            pairs |= {(i, j) for j in drawn.tolist()}
        yield f"BlockList({block}, near, first, 4 random)", _listed(setting, BlockList(block, pairs))
