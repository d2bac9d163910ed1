"""Exchanging queries and keys of cells that have no closed form.

Every key ends up in one cell, whose columns are the query slots of all the cells that hold the key. Keys that
stand in the same cells are put together, so that routed regions and clusters transpose without masks. All
steps are array operations over (key, cell) incidences: the work grows with the keys that cells list, and with
the pairs only where there are masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.patterns.arrays import few_sizes, mix, starts_of
from foveate.patterns.groups import CellGroup, ExplicitGroup

# Mask entries copied at a time.
_CHUNK = 1 << 22
# Keys with equal cells get tiles of their own from this share of a tile on; smaller families share one.
_ALONE = 4


class _Entries(NamedTuple):
    """One row for every (key slot of a cell) that some query of the cell sees."""

    lead: Tensor
    """b * H + h"""
    key: Tensor
    local: Tensor
    """number of the cell in its group"""
    column: Tensor
    """where the key stands in the cell"""
    whole: Tensor
    """whether all queries of the cell see the key"""
    cell: Tensor
    """number of the cell among all; repeats of a key in a cell count as further cells"""


class _Tiles(NamedTuple):
    """The new cells before they are written out: keys in tiles, and the old cells each tile has columns of.

    A key here is a (lead, key id) that occurs; a pair is a (tile, old cell) that shares a key.
    """

    key_id: Tensor
    key_tile: Tensor
    key_row: Tensor
    lead: Tensor
    size: Tensor
    width: Tensor
    full: Tensor
    pair_tile: Tensor
    pair_cell: Tensor
    pair_width: Tensor
    pair_column: Tensor
    entry_key: Tensor
    entry_pair: Tensor


def transpose_groups(
    groups: Sequence[CellGroup], leading: tuple[int, int], n_k: int, tile: int
) -> tuple[ExplicitGroup, ...]:
    """Return groups in which queries and keys are exchanged and each key stands in one cell at most.

    Args:
        groups: any cells, of any group kind.
        leading: the (b, h) they distinguish together.
        n_k: number of keys.
        tile: keys of a new cell, at most.
    """
    before = [sum(g.n_cells for g in groups[:i]) for i in range(len(groups) + 1)]
    parts = [_entries(group, leading, first) for group, first in zip(groups, before, strict=False)]
    if sum(part.key.numel() for part in parts) == 0:
        return ()
    entries = _Entries(*(torch.cat(column) for column in zip(*parts, strict=True)))
    entries = _tell_repeats_apart(entries, before[-1], n_k)
    widths = torch.cat([torch.full((g.n_cells,), g.tq) for g in groups])
    tiles = _tile(entries, widths, n_k, tile)
    slots = torch.cat([_flat(g.q_ids(), leading).flatten(1) for g in groups], dim=1)
    ends = torch.tensor([part.key.numel() for part in parts]).cumsum(0).tolist()
    return _write(groups, leading, entries, tiles, slots, starts_of(widths), [0, *ends])


def _flat(x: Tensor, leading: tuple[int, int]) -> Tensor:
    """(b, h, ...) -> (B * H, ...)."""
    return x.expand(*leading, *x.shape[2:]).flatten(0, 1)


def _entries(group: CellGroup, leading: tuple[int, int], first_cell: int) -> _Entries:
    keys = _flat(group.k_ids(), leading)
    mask = group.mask()
    present, whole = keys >= 0, torch.ones_like(keys, dtype=torch.bool)
    if mask is not None:
        present = present & _flat(mask.any(-2), leading)
        whole = _flat(mask.all(-2), leading).expand(keys.shape)
    lead, cell, column = present.nonzero().unbind(1)
    return _Entries(lead, keys[present], cell, column, whole[present], cell + first_cell)


def _tell_repeats_apart(entries: _Entries, n_cells: int, n_k: int) -> _Entries:
    """Where a cell lists a key several times, pretend that the later ones stand in further cells."""
    code = (entries.lead * n_cells + entries.cell) * n_k + entries.key
    ordered, order = code.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if bool(new.all()):
        return entries
    place = torch.arange(code.numel())
    rank = torch.empty_like(code)
    rank[order] = place - torch.where(new, place, 0).cummax(0).values
    return entries._replace(cell=entries.cell + n_cells * rank)


def _tile(entries: _Entries, widths: Tensor, n_k: int, tile: int) -> _Tiles:
    """Put keys into tiles and list, for every tile, the cells of which it needs columns."""
    keys, entry_key = (entries.lead * n_k + entries.key).unique(return_inverse=True)
    lead = keys // n_k
    # Keys of one family stand in the same cells. A collision of hashes only costs masked columns.
    signature = torch.zeros_like(keys).index_add_(0, entry_key, mix(entries.cell))
    _, family = signature.unique(return_inverse=True)
    _, family = (lead * (int(family.max()) + 1) + family).unique(return_inverse=True)
    head = torch.full((int(family.max()) + 1,), int(keys[-1])).scatter_reduce_(0, family, keys, "amin")
    order = head[family].argsort(stable=True)
    family, lead = family[order], lead[order]

    alone = (family.bincount() * _ALONE >= tile)[family]
    first = torch.ones_like(alone)
    first[1:] = (family[1:] != family[:-1]) & (alone[1:] | alone[:-1]) | (lead[1:] != lead[:-1])
    place = torch.arange(len(keys))
    within = place - torch.where(first, place, 0).cummax(0).values
    first = within % tile == 0
    key_tile, key_row = torch.empty_like(place), torch.empty_like(place)
    key_tile[order], key_row[order] = first.cumsum(0) - 1, within % tile
    size = key_tile.bincount()

    span = int(entries.cell.max()) + 1
    pairs, entry_pair = (key_tile[entry_key] * span + entries.cell).unique(return_inverse=True)
    pair_tile, pair_cell = pairs // span, pairs % span % len(widths)
    pair_width = widths[pair_cell]
    width = torch.zeros_like(size).index_add_(0, pair_tile, pair_width)
    wholes = torch.zeros_like(size).index_add_(0, pair_tile[entry_pair], entries.whole.long())
    return _Tiles(
        key_id=keys % n_k,
        key_tile=key_tile,
        key_row=key_row,
        lead=lead[first],
        size=size,
        width=width,
        full=wholes == size * pair_tile.bincount(),
        pair_tile=pair_tile,
        pair_cell=pair_cell,
        pair_width=pair_width,
        pair_column=starts_of(pair_width) - starts_of(width)[pair_tile],
        entry_key=entry_key,
        entry_pair=entry_pair,
    )


def _write(groups, leading, entries, tiles, slots, slot_start, bounds) -> tuple[ExplicitGroup, ...]:
    """Write the tiles out, those of similar size together.

    Tensors need as many cells for every lead. So the tiles of a lead are ranked by width, and those of equal
    rank, one per lead, get one shape: they differ little, where the widths themselves may differ much.
    """
    n_leads = leading[0] * leading[1]
    rank = _rank(tiles)
    present = rank.bincount()
    rows, columns, full, exact = (present.new_zeros(len(present)) for _ in range(4))
    rows = few_sizes(rows.scatter_reduce_(0, rank, tiles.size, "amax"))
    columns = few_sizes(columns.scatter_reduce_(0, rank, tiles.width, "amax"))
    full.index_add_(0, rank, tiles.full.long())
    exact.index_add_(0, rank, ((rows[rank] == tiles.size) & (columns[rank] == tiles.width)).long())
    # 0: needs a mask, 1: only its padding is masked, which absent ids say, 2: nothing is.
    full = (full == present).long() * (1 + (exact == n_leads))
    shapes, kind = torch.stack([rows, columns, full], dim=1).unique(dim=0, return_inverse=True)
    out = []
    for number, (n_rows, n_columns, is_full) in enumerate(shapes.tolist()):
        ranks = kind == number
        n_cells = int(ranks.sum())
        mine = ranks[rank]
        base = tiles.lead * n_cells + (ranks.cumsum(0) - 1)[rank]

        query = torch.full((n_leads * n_cells * n_rows,), -1)
        some = mine[tiles.key_tile]
        query[base[tiles.key_tile[some]] * n_rows + tiles.key_row[some]] = tiles.key_id[some]

        key = torch.full((n_leads * n_cells * n_columns,), -1)
        pair = mine[tiles.pair_tile].nonzero().flatten()
        width = tiles.pair_width[pair]
        within = torch.arange(int(width.sum())) - starts_of(width).repeat_interleave(width)
        pair = pair.repeat_interleave(width)
        tile = tiles.pair_tile[pair]
        source = slots[tiles.lead[tile], slot_start[tiles.pair_cell[pair]] + within]
        key[base[tile] * n_columns + tiles.pair_column[pair] + within] = source

        mask = None
        if not is_full:
            mask = torch.zeros(n_leads * n_cells * n_rows * n_columns, dtype=torch.bool)
            for group, lo, hi in zip(groups, bounds, bounds[1:], strict=False):
                some = torch.arange(lo, hi)
                some = some[mine[tiles.pair_tile[tiles.entry_pair[some]]]]
                for part in some.split(max(1, _CHUNK // max(group.tq, 1))):
                    pair = tiles.entry_pair[part]
                    row = base[tiles.pair_tile[pair]] * n_rows + tiles.key_row[tiles.entry_key[part]]
                    at = (row * n_columns + tiles.pair_column[pair])[:, None] + torch.arange(group.tq)
                    mask[at] = _old_columns(group, leading, entries, part)
            mask = mask.view(*leading, n_cells, n_rows, n_columns)
        query, key = query.view(*leading, n_cells, n_rows), key.view(*leading, n_cells, n_columns)
        out.append(ExplicitGroup(query, key, mask))
    return tuple(out)


def _rank(tiles: _Tiles) -> Tensor:
    """Return the place of each tile among those of its lead: masked ones first, then by falling width."""
    order = (tiles.full * (int(tiles.width.max()) + 1) - tiles.width).argsort(stable=True)
    order = order[tiles.lead[order].argsort(stable=True)]
    counts = tiles.lead.bincount()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts_of(counts)[tiles.lead[order]]
    return rank


def _old_columns(group: CellGroup, leading: tuple[int, int], entries: _Entries, part: Tensor) -> Tensor:
    """Return the columns of the old masks that belong to some entries, (entries, tq)."""
    mask = group.mask()
    if mask is None:
        return torch.ones(len(part), group.tq, dtype=torch.bool)
    b, h = entries.lead[part] // leading[1], entries.lead[part] % leading[1]
    cell = entries.local[part]
    b, h, cell = (x.clamp(max=size - 1) for x, size in zip((b, h, cell), mask.shape, strict=False))
    return mask[b, h, cell, :, entries.column[part]]
