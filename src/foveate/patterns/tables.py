"""Closed-form lowering: tile every axis by itself, then take products.

A separable pattern is one `AxisRule` per grid axis. `AxisOrder` puts the queries of an axis in an order in
which neighbours have similar keys, `axis_classes` cuts them into tiles and sorts the tiles into classes of
equal looks, and a `BoxProduct` is the product of the classes over the axes. All work is O(axis length).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.patterns.arrays import starts_of, unique_rows
from foveate.patterns.axis import AxisRule
from foveate.patterns.boxes import AxisClass, BoxGroup

# With `uniform`, a key box may grow to the size of the largest one that is at most 1/0.6 as large. The border
# tiles of a neighborhood (14 keys of 20 at window 13, tile 8) join the interior ones, causal ones do not.
UNIFORM_RATIO = 0.6
# More classes than this on one axis (a causal axis has one per tile) are thinned out the same way, with boxes
# growing by 5% at most: the number of groups stays small at 2.5% more pairs.
MAX_CLASSES = 256
THINNING_RATIO = 0.95


class AxisOrder:
    """The queries of one axis, residue class by residue class, split where neighbours share no keys.

    Inside a residue class (`i % step`) starts and stops of the key progressions never decrease, so that the
    keys of consecutive queries fill one box from the first one's start to the last one's stop. Where whole
    groups of queries share a window (Swin, HaloNet, strided neighborhoods) a tile that straddled two
    disjoint windows would compute mostly masked pairs, so the order is cut there.
    """

    def __init__(self, rule: AxisRule):
        self.rule, step, n = rule, rule.step, rule.n_q
        self.ids = torch.arange(n)
        if step > 1:
            self.ids = torch.argsort(self.ids % step, stable=True)
        self.start, self.stop = rule.start, rule.stop
        if step > 1:
            self.start, self.stop = self.start[self.ids], self.stop[self.ids]
        same = (self.start[1:] == self.start[:-1]) & (self.stop[1:] == self.stop[:-1])
        disjoint = self.start[1:] >= self.stop[:-1]
        # Position i+1 is cut off from i when they share nothing and one of them has a twin on its side.
        twin_before = torch.nn.functional.pad(same[:-1], (1, 0)) if n > 1 else torch.zeros_like(same)
        twin_after = torch.nn.functional.pad(same[1:], (0, 1)) if n > 1 else torch.zeros_like(same)
        cut = disjoint & (twin_before | twin_after)
        if step > 1:
            cut |= self.ids[1:] % step != self.ids[:-1] % step
        first = torch.nn.functional.pad(cut.nonzero().flatten() + 1, (1, 0)) if n else self.ids
        self.segment_first = first
        self.segment_size = torch.diff(first, append=torch.tensor([n]))
        self._same = same

    @property
    def longest(self) -> int:
        """The most queries a tile can have."""
        return int(self.segment_size.max()) if self.segment_size.numel() else 0

    @property
    def shared(self) -> int:
        """How many consecutive queries typically have the very same keys (1 for a plain sliding window)."""
        change = (~self._same).nonzero().flatten()
        return int(torch.diff(change).median()) if change.numel() > 2 else 1

    def cut(self, tile: int) -> tuple[Tensor, Tensor]:
        """Return (first, size) of the tiles, as positions in the order: `tile` queries each, or the rest."""
        per_segment = (self.segment_size + tile - 1) // tile
        before = starts_of(per_segment)
        total = int(per_segment.sum())
        rank = torch.arange(total) - torch.repeat_interleave(before, per_segment)
        first = torch.repeat_interleave(self.segment_first, per_segment) + tile * rank
        end = torch.repeat_interleave(self.segment_first + self.segment_size, per_segment)
        return first, torch.minimum(end - first, torch.tensor(tile))

    def boxes(self, first: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return (start, count) of the box of keys of each tile."""
        start = self.start[first]
        return start, (self.stop[first + size - 1] - start) // self.rule.step

    def price(self, tile: int) -> tuple[int, int, int]:
        """Return, summed over the tiles: pairs computed, keys gathered, and the number of tiles."""
        first, size = self.cut(tile)
        _, count = self.boxes(first, size)
        return int((size * count).sum()), int(count.sum()), first.numel()


def axis_classes(rule: AxisRule, tile: int, *, uniform: bool = False) -> tuple[AxisClass, ...]:
    """Cut the queries of an axis into tiles of `tile` and sort the tiles into classes.

    Args:
        rule: the keys of every position.
        tile: queries of a tile, >= 1; what is left over at the end of a residue class or window makes a
            smaller tile.
        uniform: let small key boxes grow (moved so as to stay inside the axis, the surplus masked), so that
            there are few classes with several masks each instead of many with one.
    """
    order = AxisOrder(rule)
    first, size = order.cut(tile)
    out: list[AxisClass] = []
    for q_count in size.unique().tolist():
        mine = first[size == q_count]
        members = mine[:, None] + torch.arange(q_count)
        start, count = order.boxes(mine, torch.full_like(mine, q_count))
        lows, highs = order.start[members], order.stop[members]
        look = torch.cat([lows, highs], dim=1) - start[:, None]
        kinds, label = unique_rows(torch.cat([count[:, None], look], dim=1))
        if uniform or len(kinds) > MAX_CLASSES:
            start, count = _grow(start, count, rule, UNIFORM_RATIO if uniform else THINNING_RATIO)
            kinds, label = unique_rows(count[:, None])
        tiles = label.argsort(stable=True).split(label.bincount(minlength=len(kinds)).tolist())
        lows, highs = ((x - start[:, None]) // rule.step for x in (lows, highs))
        out += [_class_of(rule, q_count, order.ids[mine], start, count, lows, highs, t) for t in tiles]
    return tuple(out)


def _class_of(rule, q_count, q_starts, start, count, lows, highs, tiles) -> AxisClass:
    """Make one class of `tiles`, which agree in the sizes of their boxes."""
    representatives, variant = unique_rows(torch.cat([lows[tiles], highs[tiles]], dim=1))
    rows = tiles[representatives]
    return AxisClass(
        q_starts=q_starts[tiles],
        k_starts=start[tiles],
        q_count=q_count,
        k_count=int(count[tiles[0]]),
        first=lows[rows],
        last=highs[rows],
        q_step=rule.step,
        k_step=rule.step,
        variant=variant if len(rows) > 1 else None,
    )


def _grow(start: Tensor, count: Tensor, rule: AxisRule, ratio: float) -> tuple[Tensor, Tensor]:
    """Enlarge boxes to few sizes, none to more than 1/ratio of what it was, where they fit the axis."""
    sizes, place = count.unique(return_inverse=True)
    targets, current = [], math.inf
    for size in reversed(sizes.tolist()):
        current = size if current == math.inf or size < ratio * current else current
        targets.append(current)
    grown = torch.tensor(targets[::-1], dtype=torch.int64)[place]
    phase = start % rule.step
    room = (rule.n_k - 1 - phase) // rule.step + 1
    grown = torch.where(grown > room, count, grown)
    return torch.minimum(start, phase + rule.step * (room - grown)), grown


@dataclass(frozen=True, eq=False)
class BoxProduct:
    """A separable pattern in cells: the classes of each axis, of which the product makes the groups.

    Attributes:
        axes: the classes of every axis, slowest axis first; together they hold every position once.
        q_sizes: sizes of the query grid.
        k_sizes: sizes of the key grid.
        steps: (step, phase) of each axis' rule.
        lead: tokens that stand before the grid: among the queries, and among the keys.
        linked: whether leading tokens and grid see one another; leading queries always see leading keys.
    """

    axes: tuple[tuple[AxisClass, ...], ...]
    q_sizes: tuple[int, ...]
    k_sizes: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    lead: tuple[int, int] = (0, 0)
    linked: bool = True

    @classmethod
    def of(
        cls,
        rules: tuple[AxisRule, ...],
        tile: tuple[int, ...],
        *,
        uniform: bool = False,
        lead: tuple[int, int] = (0, 0),
        linked: bool = True,
    ) -> BoxProduct:
        """Tile the rules, one tile size per axis."""
        return cls(
            tuple(axis_classes(rule, t, uniform=uniform) for rule, t in zip(rules, tile, strict=True)),
            tuple(rule.n_q for rule in rules),
            tuple(rule.n_k for rule in rules),
            tuple((rule.step, rule.phase) for rule in rules),
            lead,
            linked,
        )

    @property
    def n_q(self) -> int:
        """Number of queries, leading ones included."""
        return self.lead[0] + math.prod(self.q_sizes)

    @property
    def n_k(self) -> int:
        """Number of keys, leading ones included."""
        return self.lead[1] + math.prod(self.k_sizes)

    def _products(self) -> list[BoxGroup]:
        seen = self.lead[1] if self.linked else 0
        return [
            BoxGroup(classes, self.q_sizes, self.k_sizes, *self.lead, seen)
            for classes in itertools.product(*self.axes)
        ]

    def groups(self) -> tuple[BoxGroup, ...]:
        """Return the groups, one per combination of classes that has keys, and the rows of leading queries."""
        groups = [group for group in self._products() if group.tk > 0]
        seen = self.n_k if self.linked else self.lead[1]
        if self.lead[0] and seen:
            rows = AxisClass.full(self.lead[0], seen)
            groups.append(BoxGroup((rows,), (self.n_q,), (self.n_k,)))
        return tuple(groups)

    def query_tiles(self) -> list[Int[Tensor, "c tq"]]:
        """Return all queries of the grid, each once, as the tiles they stand in (with or without keys)."""
        return [group.q_ids()[0, 0] for group in self._products()]

    def rules(self) -> tuple[AxisRule, ...]:
        """Rebuild the rules that were tiled."""
        sizes = zip(self.axes, self.q_sizes, self.k_sizes, self.steps, strict=True)
        return tuple(_rule_of(classes, n_q, n_k, *steps) for classes, n_q, n_k, steps in sizes)


def _rule_of(classes: tuple[AxisClass, ...], n_q: int, n_k: int, step: int, phase: int) -> AxisRule:
    start, count = torch.zeros(n_q, dtype=torch.int64), torch.zeros(n_q, dtype=torch.int64)
    for c in classes:
        ids = c.q_starts[:, None] + c.q_step * torch.arange(c.q_count)
        rows = c.variants(torch.arange(c.n_tiles))
        start[ids] = c.k_starts[:, None] + step * c.first[rows]
        count[ids] = (c.last - c.first)[rows]
    return AxisRule(n_q, n_k, start, count, step, phase)
