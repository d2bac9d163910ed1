"""`BoxGroup`: cells in closed form, products over the axes of a grid of equal tiles and equal key boxes.

All cells of a group are translations of one another, so a group is one small description per axis:
a million-token neighborhood takes a few kilobytes and no id is stored until somebody asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.lazy import cached_property
from foveate.patterns.groups import CellGroup, KeyRuns, runs_of


@dataclass(frozen=True, eq=False)
class AxisClass:
    """Tiles of one axis that look alike: same number of queries, same number of keys, same steps.

    Tile `m` holds the queries `q_starts[m] + q_step * i`, i < q_count, and the keys
    `k_starts[m] + k_step * t`, t < k_count. Query `i` sees the columns `first <= t < last` of the key box,
    where `first` and `last` are row `variant[m]` of the tables (row 0 when `variant` is None).

    Shapes: `q_starts`, `k_starts` and `variant` (tiles,), `first` and `last` (variants, q_count); int64.
    """

    q_starts: Int[Tensor, "m"]
    k_starts: Int[Tensor, "m"]
    q_count: int
    k_count: int
    first: Int[Tensor, "v q"]
    last: Int[Tensor, "v q"]
    q_step: int = 1
    k_step: int = 1
    variant: Int[Tensor, "m"] | None = None

    @classmethod
    def full(cls, q_count: int, k_count: int) -> AxisClass:
        """One tile: queries 0..q_count-1 see all keys 0..k_count-1."""
        zero = torch.zeros(1, dtype=torch.int64)
        first = torch.zeros(1, q_count, dtype=torch.int64)
        return cls(zero, zero, q_count, k_count, first, torch.full_like(first, k_count))

    @property
    def n_tiles(self) -> int:
        """Number of tiles in the class."""
        return self.q_starts.numel()

    @property
    def n_variants(self) -> int:
        """Number of distinct masks in the class."""
        return self.first.shape[0]

    @cached_property
    def _variant_tiles(self) -> Tensor:
        """(variants,) how many tiles use each mask."""
        if self.variant is None:
            return torch.tensor([self.n_tiles])
        return torch.bincount(self.variant.cpu(), minlength=self.n_variants)

    @cached_property
    def pairs(self) -> int:
        """Pairs of axis positions that count, over all tiles."""
        return int(((self.last - self.first).sum(1).cpu() * self._variant_tiles).sum())

    @cached_property
    def full_tiles(self) -> int:
        """Tiles in which every pair counts."""
        full = ((self.first == 0) & (self.last == self.k_count)).all(1)
        return int((full.cpu() * self._variant_tiles).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of the class."""
        tensors = [self.q_starts, self.k_starts, self.first, self.last]
        return sum(t.numel() * t.element_size() for t in tensors) + (
            0 if self.variant is None else self.variant.numel() * self.variant.element_size()
        )

    def variants(self, tiles: Int[Tensor, "c"]) -> Int[Tensor, "c"]:
        """Return the mask row of each of the given tiles."""
        return torch.zeros_like(tiles) if self.variant is None else self.variant[tiles]

    def masks(self, variants: Int[Tensor, "c"]) -> Bool[Tensor, "c q k"]:
        """Materialise the given masks."""
        t = torch.arange(self.k_count, device=self.first.device)
        first, last = self.first[variants][..., None], self.last[variants][..., None]
        return (t >= first) & (t < last)

    def to(self, device) -> AxisClass:
        """Return the class with its tensors on `device`."""
        names = ("q_starts", "k_starts", "first", "last", "variant")
        return replace(self, **{n: v.to(device) for n in names if (v := getattr(self, n)) is not None})


def _outer(parts: list[Tensor]) -> Tensor:
    """Join 1-d offset tables, one per axis, into one table over the product, last axis fastest."""
    total = parts[0]
    for part in parts[1:]:
        total = (total[:, None] + part[None, :]).reshape(-1)
    return total


def _pitches(sizes: tuple[int, ...]) -> list[int]:
    """Row-major distance between neighbours along each axis."""
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


@dataclass(frozen=True, eq=False)
class BoxGroup(CellGroup):
    """The product of one `AxisClass` per axis: cells, queries, keys and masks are all outer products.

    Args:
        axes: one class per axis, slowest first. Cell c is tile (m_0, m_1, ...) row-major.
        q_sizes: sizes of the query grid, by which axis positions become ids.
        k_sizes: sizes of the key grid.
        q_offset: added to every query id (special tokens stand before the grid).
        k_offset: added to every key id of the grid.
        lead: every cell also holds the keys 0..lead-1, in its first columns, seen by all its queries.
    """

    axes: tuple[AxisClass, ...]
    q_sizes: tuple[int, ...]
    k_sizes: tuple[int, ...]
    q_offset: int = 0
    k_offset: int = 0
    lead: int = 0

    @property
    def leading(self) -> tuple[int, int]:
        """Always (1, 1): closed forms are static."""
        return 1, 1

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(a.n_tiles for a in self.axes)

    @property
    def n_cells(self) -> int:
        """Number of cells C."""
        return math.prod(self.tiles)

    @property
    def tq(self) -> int:
        """Query slots of a cell."""
        return math.prod(a.q_count for a in self.axes)

    @property
    def tk(self) -> int:
        """Key slots of a cell."""
        return self.lead + math.prod(a.k_count for a in self.axes)

    @property
    def pairs_needed(self) -> int:
        """Pairs that the masks let through, from per-axis sums."""
        return math.prod(a.pairs for a in self.axes) + self.lead * self.tq * self.n_cells

    @property
    def full_cells(self) -> int:
        """Cells in which every pair counts."""
        return math.prod(a.full_tiles for a in self.axes)

    @property
    def n_variants(self) -> int:
        """Number of distinct masks."""
        return math.prod(a.n_variants for a in self.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors the group stores (shared axis classes counted once per group)."""
        return sum(a.nbytes for a in self.axes)

    @property
    def device(self) -> torch.device:
        """Where the ids materialise."""
        return self.axes[0].q_starts.device

    def _tile_indices(self, lo: int, hi: int | None) -> list[Tensor]:
        """Split the cell numbers `lo:hi` into one tile number per axis."""
        cells = torch.arange(self.n_cells, device=self.device)[lo:hi]
        out = []
        for count in reversed(self.tiles):
            out.append(cells % count)
            cells = cells // count
        return out[::-1]

    def q_offsets(self) -> Int[Tensor, "tq"]:
        """Return the ids of a cell's queries relative to its first one (`q_bases`)."""
        steps = zip(self.axes, _pitches(self.q_sizes), strict=True)
        return _outer([torch.arange(a.q_count, device=self.device) * (a.q_step * p) for a, p in steps])

    def k_offsets(self) -> Int[Tensor, "tk_box"]:
        """Return the ids of a cell's box of keys (without the leading ones) relative to `k_bases`."""
        steps = zip(self.axes, _pitches(self.k_sizes), strict=True)
        return _outer([torch.arange(a.k_count, device=self.device) * (a.k_step * p) for a, p in steps])

    def q_bases(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "c"]:
        """Return the first query id of cells `lo:hi`."""
        parts = zip(self.axes, self._tile_indices(lo, hi), _pitches(self.q_sizes), strict=True)
        return sum((a.q_starts[m] * p for a, m, p in parts), torch.tensor(self.q_offset, device=self.device))

    def k_bases(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "c"]:
        """Return the first key id of the boxes of cells `lo:hi`."""
        parts = zip(self.axes, self._tile_indices(lo, hi), _pitches(self.k_sizes), strict=True)
        return sum((a.k_starts[m] * p for a, m, p in parts), torch.tensor(self.k_offset, device=self.device))

    def q_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "1 1 c tq"]:
        """Materialise the query ids of cells `lo:hi`."""
        return (self.q_bases(lo, hi)[:, None] + self.q_offsets())[None, None]

    def k_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "1 1 c tk"]:
        """Materialise the key ids of cells `lo:hi`, the leading keys first."""
        ids = self.k_bases(lo, hi)[:, None] + self.k_offsets()
        if self.lead:
            lead = torch.arange(self.lead, device=ids.device).expand(ids.shape[0], -1)
            ids = torch.cat([lead, ids], dim=1)
        return ids[None, None]

    def _join_masks(self, masks: list[Tensor]) -> Tensor:
        """Join one (c, q_a, k_a) mask per axis into (c, tq, tk), the leading keys first."""
        total = masks[0]
        for mask in masks[1:]:
            c, q, k = total.shape
            total = total[:, :, None, :, None] & mask[:, None, :, None, :]
            total = total.reshape(c, q * mask.shape[1], k * mask.shape[2])
        return torch.nn.functional.pad(total, (self.lead, 0), value=True) if self.lead else total

    def mask(self, lo: int = 0, hi: int | None = None) -> Bool[Tensor, "1 1 c tq tk"] | None:
        """Materialise the masks of cells `lo:hi`: one if all share it, None when no pair is masked."""
        if self.is_full:
            return None
        tiles = self._tile_indices(lo, hi)
        if self.n_variants == 1:
            tiles = [m[:1] * 0 for m in self._tile_indices(0, 1)]
        masks = [a.masks(a.variants(m)) for a, m in zip(self.axes, tiles, strict=True)]
        return self._join_masks(masks)[None, None]

    def mask_variants(self) -> Bool[Tensor, "1 1 v tq tk"] | None:
        """Materialise the distinct masks, last axis' variant fastest; None when no pair is masked."""
        if self.is_full:
            return None
        counts = [a.n_variants for a in self.axes]
        rows = torch.cartesian_prod(*[torch.arange(n, device=self.device) for n in counts])
        rows = rows.reshape(-1, len(counts))
        return self._join_masks([a.masks(rows[:, i]) for i, a in enumerate(self.axes)])[None, None]

    def mask_index(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "c"] | None:
        """Return, for cells `lo:hi`, the position in `mask_variants` of each one's mask."""
        if self.is_full:
            return None
        index = torch.zeros((), dtype=torch.int64, device=self.device)
        for axis, tiles in zip(self.axes, self._tile_indices(lo, hi), strict=True):
            index = index * axis.n_variants + axis.variants(tiles)
        return index

    def key_runs(self, lo: int = 0, hi: int | None = None) -> KeyRuns:
        """Return the keys of cells `lo:hi` as runs; all cells have the same run lengths."""
        offset, length, column = runs_of(self.k_offsets())
        start = self.k_bases(lo, hi)[:, None] + offset
        if self.lead:
            start = torch.nn.functional.pad(start, (1, 0), value=0)
            length = torch.nn.functional.pad(length, (1, 0), value=self.lead)
            column = torch.nn.functional.pad(column + self.lead, (1, 0), value=0)
        shape = (1, 1, *start.shape)
        return KeyRuns(start[None, None], length.expand(shape), column.expand(shape))

    def to(self, device) -> BoxGroup:
        """Return the group with its tensors on `device`."""
        return replace(self, axes=tuple(a.to(device) for a in self.axes))
