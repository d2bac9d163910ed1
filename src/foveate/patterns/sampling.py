"""Which tile, where no closed form tells: count the keys that a few sample tiles see.

A union sees the keys of all its parts, so that the best tile of one part may be a bad one for the whole: a row of
queries shares its row of keys, but has every column. Hence tiles are tried on the pattern itself. Some are laid
over it, evenly spaced; of the candidate keys of each, as many are looked at as a fixed number of pairs allows; and
the mean is priced by the caller's model. The search starts at tiles of few sizes and all aspect ratios, at the best
tiles of the parts, and at their blocks, and walks on to neighbours while they are cheaper.

Everything is deterministic. Time and memory depend on the number of tiles tried, not on N x N.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.patterns.arrays import mix
from foveate.patterns.axis import AxisRule
from foveate.patterns.pattern import Pattern
from foveate.patterns.tables import AxisOrder
from foveate.patterns.tiling import Price, cost_of

Tile = tuple[int, ...]


# Tiles looked at for one size, and (query, key) pairs evaluated in each.
_TILES, _PAIRS = 4, 1 << 14
# Queries of the smallest tile: a cell has a price of its own, in time and in the lowering. Longer sequences get no
# more cells than this by choice.
_SMALLEST, _MOST_CELLS = 16, 4096
# Queries of the tiles where the search starts, by the number of axes.
_STARTS = {1: (16, 32, 64, 128, 256, 512, 1024), 2: (16, 64, 256)}
_STARTS_MORE_AXES = (16, 256)
# Sampled positions are evenly spaced along the first axis, and by these along the others (all ratios of them are far
# from simple fractions, so that no column is met twice).
_GOLDEN = (0.6180339887, 0.7548776662, 0.5698402910)
# Frames compared: beyond a few they hardly differ.
_MOST_FRAMES = 3


class Frame(NamedTuple):
    """How queries may be put into tiles.

    Attributes:
        rules: the axes, whose classes and windows no tile crosses.
        lead: special tokens before them, which stand in no tile.
        sizes: tiles to try along a single axis, e.g. the blocks of a part; empty for all powers of two.
    """

    rules: tuple[AxisRule, ...]
    lead: int = 0
    sizes: tuple[int, ...] = ()


class Sampled(NamedTuple):
    """What tiles of one size come to, as `patterns/tiling.py` prices it."""

    queries: int
    pairs: float
    keys: float
    cells: int


class Sampler:
    """Counts of a pattern in tiles of any size, kept once they are known.

    Args:
        where: the pattern.
        n_q: number of queries.
        n_k: number of keys.
        frames: how its queries may be put into tiles; those in which tiles are the same count once.
    """

    def __init__(self, where: Pattern, n_q: int, n_k: int, frames: list[Frame]):
        self.where, self.n_q, self.n_k = where, n_q, n_k
        self.frames: list[Frame] = []
        self._orders: list[tuple[AxisOrder, ...]] = []
        self._own: list[tuple[int, Tile]] = []
        for frame in frames:
            orders = tuple(AxisOrder(rule) for rule in frame.rules)
            at = next((i for i in range(len(self.frames)) if self._alike(i, frame.lead, orders)), None)
            if at is None and (len(self.frames) < _MOST_FRAMES or frame.sizes):
                at = len(self.frames)
                self.frames.append(frame)
                self._orders.append(orders)
            if at is not None:
                self._own += [(at, (size,)) for size in frame.sizes]
        self._known: dict[tuple[int, Tile], Sampled] = {}

    def best(self, cost: Price, max_queries: int, starts: list[tuple[int, Tile]]) -> Tile:
        """Return the tile of least cost that the search finds.

        Args:
            cost: (queries of a full tile, pairs computed, keys gathered, cells) -> cost.
            max_queries: the most queries of a tile.
            starts: further (frame, tile) to try, at least one; the first is taken where no tile has a good size.
        """
        tried: dict[tuple[int, Tile], float] = {}
        first = starts[0]

        def consider(frame: int, tile: Tile) -> None:
            tile = self._clipped(frame, tile)
            fits = self._fewest(frame, max_queries) <= math.prod(tile) <= max_queries
            if fits and (frame, tile) not in tried:
                tried[frame, tile] = cost(*self.count(frame, tile))

        for frame, (rules, _, sizes) in enumerate(self.frames):
            starts = starts + [(frame, tile) for tile in _starts(len(rules), max_queries) if not sizes]
        for frame, tile in starts + self._own:
            consider(frame, tile)
        if not tried:
            return self._clipped(*first)
        at = None
        while at != (at := min(tried, key=tried.__getitem__)):
            frame, tile = at
            for near in _neighbours(tile):
                consider(frame, near)
        return at[1]

    def frame_for(self, tile: Tile) -> Frame:
        """Return the frame with as many axes in which tiles of this size cost least."""
        mine = [i for i, frame in enumerate(self.frames) if len(frame.rules) == len(tile)]
        if len(mine) == 1:
            return self.frames[mine[0]]
        cost, _ = cost_of()
        return self.frames[min(mine, key=lambda i: cost(*self.count(i, self._clipped(i, tile))))]

    def count(self, frame: int, tile: Tile) -> Sampled:
        """Return what tiles of this size come to."""
        if (frame, tile) not in self._known:
            self._known[frame, tile] = self._count(frame, tile)
        return self._known[frame, tile]

    def _count(self, frame: int, tile: Tile) -> Sampled:
        orders = self._orders[frame]
        cuts = [order.cut(size) for order, size in zip(orders, tile, strict=True)]
        cells = math.prod(len(first) for first, _ in cuts)
        lengths = [order.rule.n_q for order in orders]
        pairs, keys = 0.0, 0.0
        for at, weight in _looks([size for _, size in cuts]) if cells <= _TILES else _samples(cuts, lengths):
            ids = torch.zeros(1, dtype=torch.int64)
            for order, (first, size), i in zip(orders, cuts, at, strict=True):
                own = order.ids[int(first[i]) : int(first[i] + size[i])]
                ids = (ids[:, None] * order.rule.n_q + own).flatten()
            seen = self._seen(ids + self.frames[frame].lead)
            pairs += weight * seen
            keys += weight * seen / len(ids)
        return Sampled(math.prod(tile), pairs, keys, cells)

    def _seen(self, q: Int[Tensor, "t"]) -> float:
        """Return how many keys some of these queries see, estimated where there are many candidates."""
        keys = self.where.candidates(q, self.n_q, self.n_k)
        looked, every = max(64, _PAIRS // len(q)), len(keys)
        if every > looked:
            # Scrambled, since evenly spaced keys would follow the rhythm of strided patterns.
            keys = keys[mix(torch.arange(looked)) % every]
        allowed = self.where.allowed(q[:, None], keys[None], self.n_q, self.n_k).expand(len(q), len(keys))
        return int(allowed.any(0).sum()) * every / max(len(keys), 1)

    def _clipped(self, frame: int, tile: Tile) -> Tile:
        longest = (max(order.longest, 1) for order in self._orders[frame])
        return tuple(min(size, most) for size, most in zip(tile, longest, strict=True))

    def _fewest(self, frame: int, max_queries: int) -> int:
        """Return the fewest queries a tile should have."""
        some = max(_SMALLEST, self.n_q // _MOST_CELLS)
        return min(some, max_queries, math.prod(max(order.longest, 1) for order in self._orders[frame]))

    def _alike(self, frame: int, lead: int, orders: tuple[AxisOrder, ...]) -> bool:
        """Whether tiles in a frame are those of another one."""
        mine = self._orders[frame]
        if self.frames[frame].lead != lead or len(mine) != len(orders):
            return False
        return all(_same_tiles(a, b) for a, b in zip(mine, orders, strict=True))


def _same_tiles(a: AxisOrder, b: AxisOrder) -> bool:
    return (
        a.rule.n_q == b.rule.n_q
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.segment_first, b.segment_first)
    )


def _starts(n_axes: int, max_queries: int) -> list[Tile]:
    """Return tiles of few sizes whose sides are powers of two (of four, on several axes)."""
    sizes = [n for n in _STARTS.get(n_axes, _STARTS_MORE_AXES) if n <= max_queries] or [max_queries]
    if n_axes == 1:
        return [(n,) for n in sizes]
    sides = [4**i for i in range(6)]
    return [tile for tile in itertools.product(sides, repeat=n_axes) if math.prod(tile) in sizes]


def _neighbours(tile: Tile) -> Iterator[Tile]:
    """Yield tiles with one side halved, doubled, or both on two sides."""
    axes = range(len(tile))
    for down, up in itertools.product((None, *axes), repeat=2):
        if down == up or (down is not None and tile[down] == 1):
            continue
        yield tuple(s // 2 if i == down else s * 2 if i == up else s for i, s in enumerate(tile))


def _looks(sizes: list[Tensor]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every tile, one index per axis, and how many queries it has."""
    for at in itertools.product(*(range(len(size)) for size in sizes)):
        yield at, math.prod(int(size[i]) for size, i in zip(sizes, at, strict=True))


def _samples(
    cuts: list[tuple[Tensor, Tensor]], lengths: list[int]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield some tiles, those where sampled queries stand, and for how many queries each speaks.

    By queries, as tiles may differ much in size: a long one is met more often than a short one.
    """
    # The longest axis is the one to be spaced evenly: on causal axes the number of keys grows along it.
    even = max(range(len(lengths)), key=lengths.__getitem__)
    for i in range(_TILES):
        at = []
        for axis, ((first, _), n) in enumerate(zip(cuts, lengths, strict=True)):
            share = (i + 0.5) / _TILES if axis == even else (i + 0.5) * _GOLDEN[axis % 3] % 1.0
            at.append(int(torch.searchsorted(first, int(share * n), right=True)) - 1)
        yield tuple(at), math.prod(lengths) / _TILES
