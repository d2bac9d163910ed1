"""Lowering what has no closed form: one query tile at a time, from candidate keys to the keys really seen.

Never more than a tile's queries times a bounded number of candidate keys is evaluated at once, so that memory
grows with the pairs that the result computes, not with N x N.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.patterns.arrays import few_sizes
from foveate.patterns.basic import BlockList
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.pattern import Pattern

# (query, candidate) pairs evaluated at a time.
_CHUNK = 1 << 22
_Cell = tuple[Tensor, Tensor, Tensor | None]


def lower_tiles(
    where: Pattern, tiles: Iterable[Int[Tensor, "c tq"]], n_q: int, n_k: int
) -> tuple[ExplicitGroup, ...]:
    """Return the cells of a pattern for given query tiles; tiles whose queries have no key make none."""
    cells = [_cell(where, q, n_q, n_k) for stack in tiles for q in stack]
    return _gather([cell for cell in cells if cell[1].numel()])


def _cell(where: Pattern, q: Int[Tensor, "tq"], n_q: int, n_k: int) -> _Cell:
    """Return the queries, the keys that one of them sees, and their mask (None when all see all)."""
    keys, masks = [], []
    for part in where.candidates(q, n_q, n_k).split(max(1, _CHUNK // max(len(q), 1))):
        allowed = where.allowed(q[:, None], part[None, :], n_q, n_k).expand(len(q), len(part))
        seen = allowed.any(0)
        keys.append(part[seen])
        masks.append(allowed[:, seen])
    if not keys:
        return q, torch.zeros(0, dtype=torch.int64), None
    mask = torch.cat(masks, dim=1)
    return q, torch.cat(keys), None if bool(mask.all()) else mask


def _gather(cells: list[_Cell]) -> tuple[ExplicitGroup, ...]:
    """Stack cells of similar size into groups, those without a mask apart from those with one."""
    if not cells:
        return ()
    width = torch.tensor([len(k) for _, k, _ in cells])
    height = torch.tensor([len(q) for q, _, _ in cells])
    columns = few_sizes(width)
    # 0: needs a mask, 1: only its padding is masked, which absent ids say, 2: nothing is.
    full = torch.tensor([mask is None for *_, mask in cells]).long() * (1 + (columns == width))
    shapes, kind = torch.stack([height, columns, full], dim=1).unique(dim=0, return_inverse=True)
    out = []
    for number, (n_rows, n_columns, is_full) in enumerate(shapes.tolist()):
        mine = [cells[i] for i in (kind == number).nonzero().flatten().tolist()]
        keys = torch.full((len(mine), n_columns), -1)
        masks = None if is_full else torch.zeros(len(mine), n_rows, n_columns, dtype=torch.bool)
        for row, (_, k, mask) in enumerate(mine):
            keys[row, : len(k)] = k
            if masks is not None:
                masks[row, :, : len(k)] = True if mask is None else mask
        queries = torch.stack([q for q, _, _ in mine])
        out.append(ExplicitGroup(queries[None, None], keys[None, None], _lead(masks)))
    return tuple(out)


def _lead(masks: Bool[Tensor, "c tq tk"] | None) -> Tensor | None:
    return None if masks is None else masks[None, None]


def lower_blocks(where: BlockList, n_q: int, n_k: int) -> tuple[ExplicitGroup, ...]:
    """Return one cell per listed block of queries, its keys block after block, without looking at pairs."""
    block_q, block_k = where.block
    table = where.table
    counts = table.sum(1)
    shapes = few_sizes(counts)
    q_blocks = torch.arange(len(table))
    height = (n_q - q_blocks * block_q).clamp(0, block_q)
    used = (counts > 0) & (height > 0)
    out = []
    for n_rows, n_blocks in torch.stack([height, shapes], dim=1)[used].unique(dim=0).tolist():
        mine = (used & (height == n_rows) & (shapes == n_blocks)).nonzero().flatten()
        queries = mine[:, None] * block_q + torch.arange(n_rows)
        # Listed blocks first, in order; the rest of the row is absent.
        listed, order = table[mine].sort(dim=1, descending=True, stable=True)
        listed = torch.nn.functional.pad(listed, (0, max(n_blocks - listed.shape[1], 0)))[:, :n_blocks]
        order = torch.nn.functional.pad(order, (0, max(n_blocks - order.shape[1], 0)))[:, :n_blocks]
        keys = order[..., None] * block_k + torch.arange(block_k)
        keys = torch.where(listed[..., None] & (keys < n_k), keys, -1).flatten(1)
        keys = keys[:, (keys >= 0).any(0)]
        out.append(ExplicitGroup(queries[None, None], keys[None, None]))
    return tuple(out)
