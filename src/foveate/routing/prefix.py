"""The best keys of every causal prefix, by a score that belongs to the key alone.

The best `size` keys of a prefix change by at most one key from a query to the next. So a tile of T queries needs
the best keys before the tile and the T keys inside it, and nothing else: cells of size + T keys with a mask.
Everything is decided on unique ranks from one sort, so that the same keys are chosen however queries are tiled:
decoding one query chooses what training chose. Time and memory are O(N (size + T)), never N x N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import bad
from foveate.patterns.cells import Cells, cells_of
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection
from foveate.routing.blocks import block_count, select_blocks


def select_prefix_top(
    scores: Num[Tensor, "b h n_k"],
    size: int,
    *,
    n_q: int | None = None,
    present: Bool[Tensor, "b n_k"] | None = None,
    group: int = 1,
    smooth: int = 1,
    tile: int | None = None,
) -> Selection:
    """Return the selection in which a query sees the `size` best keys up to its own position.

    Args:
        scores: how much each key is wanted by whoever asks. Among equals the later key is taken.
        size: keys per query; queries with fewer keys before them see all of them.
        n_q: number of queries, which stand at the end of the keys; as many as keys by default.
        present: False for keys that nobody may take, such as padding.
        group: rows of queries per position that share its choice. Query row `i * group + r` stands at position
            `n_k - n_q + i`: so heads that read one key head become rows of it, and its keys are gathered once.
        smooth: keys per block: a query sees all of a block up to its own position when its choice has more than
            half of that, and nothing of it otherwise. 1 leaves the choice as it is.
        tile: positions per cell, `size` by default, between 16 and 128.

    Raises:
        ArgumentError: naming the argument that makes no sense.
    """
    n_k = scores.shape[-1]
    n_q = n_k if n_q is None else check_int(n_q, "n_q", 0)
    if n_q > n_k:
        raise bad("n_q", n_q, f"at most the {n_k} keys")
    check_int(size, "size", 1)
    check_int(group, "group", 1)
    tile = min(max(size, 16), 128) if tile is None else check_int(tile, "tile", 1)
    # A few queries at the end need no tile of empty rows.
    tile = max(min(tile, n_q), 1)
    tops = _tops(scores.detach(), size, n_q, present, tile)
    if check_int(smooth, "smooth", 1) > 1:
        parts = [_block_counts(ids, kept, n_k, smooth) for _, ids, kept in tops]
        counts = torch.cat(parts, 2)[:, :, :n_q] if parts else scores.new_zeros(*scores.shape[:2], 0, 0)
        return select_smooth(counts.long(), smooth, n_k, group=group, rows=tile)
    shapes: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    for cell in tops:
        shapes.setdefault(cell[1].shape[-1], []).append(cell)
    rows = torch.arange(tile * group, device=scores.device)
    cells = []
    for same in shapes.values():
        firsts = torch.tensor([first for first, _, _ in same], device=scores.device) - (n_k - n_q)
        q_ids = firsts[:, None] * group + rows
        q_ids = torch.where(q_ids < n_q * group, q_ids, -1)
        k_ids = torch.stack([ids for _, ids, _ in same], dim=2)
        kept = torch.stack([kept for _, _, kept in same], dim=2).repeat_interleave(group, dim=3)
        cells.append(cells_of(q_ids[None, None], k_ids, kept))
    nothing = torch.full((1, 1, 1, 1), -1, device=scores.device)
    return Selection.of_cells(cells or [Cells(nothing, nothing)], n_q * group, n_k)


def select_smooth(
    counts: Int[Tensor, "b h n_q blocks"], smooth: int, n_k: int, *, group: int = 1, rows: int = 64
) -> Selection:
    """Return the selection of blocks of `smooth` keys, of whose keys up to the query more than half were chosen.

    Args:
        counts: how many keys of each block each query chose.
        smooth: keys per block; the last block may be shorter.
        n_k: number of keys; queries stand at their end.
        group: rows of queries per position, as in `select_prefix_top`.
        rows: positions per cell.
    """
    n_q = counts.shape[2]
    kept = 2 * counts > seen_sizes(n_q, n_k, smooth, counts.device)
    at = torch.arange(n_q * group, device=counts.device) // group + (n_k - n_q)
    return select_blocks(
        kept,
        group,
        smooth,
        n_q * group,
        n_k,
        causal=True,
        positions=(at, torch.arange(n_k, device=counts.device)),
        rows=max(min(rows, n_q), 1),
    )


def seen_sizes(
    n_q: int, n_k: int, smooth: int, device: torch.device | None = None
) -> Int[Tensor, "n_q blocks"]:
    """Return how many keys each block has up to each query; queries stand at the end of the keys.

    Counting whole blocks instead would let a query's choice depend on whether later tokens exist.
    """
    first = torch.arange(block_count(n_k, smooth), device=device) * smooth
    seen = torch.arange(n_k - n_q, n_k, device=device)[:, None] + 1
    return (seen - first).clamp(min=0, max=smooth)


def _tops(
    scores: Tensor, size: int, n_q: int, present: Tensor | None, tile: int
) -> Iterator[tuple[int, Int[Tensor, "b h w"], Bool[Tensor, "b h t w"]]]:
    """Yield, for each tile of positions: its first position, key ids (-1 for none), which query takes which."""
    n_k = scores.shape[-1]
    if not n_q:
        return
    # order[r] is the key of rank r: best first, later keys before earlier ones of the same score.
    order = n_k - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    counting = torch.arange(n_k, device=scores.device)
    ranks = torch.empty_like(order).scatter_(-1, order, counting.expand_as(order))
    if present is not None:
        ranks = ranks.masked_fill(~present[:, None], n_k)
    first = n_k - n_q
    # Rank n_k is nobody's; what stands behind the end has it too.
    order = functional.pad(order, (0, 1), value=-1)
    ranks = functional.pad(ranks, (0, -n_q % tile), value=n_k)
    best = ranks[..., :first].topk(min(size, first), dim=-1, largest=False, sorted=False).values
    for start in range(first, n_k, tile):
        # Few different widths, so that cells share a shape.
        width = min(size, 1 << (start - 1).bit_length() if start else 0)
        known = functional.pad(best, (0, width - best.shape[-1]), value=n_k)
        ranked = torch.cat([known, ranks[..., start : start + tile]], dim=-1).sort(dim=-1).values
        ids = order.gather(-1, ranked)
        at = torch.arange(start, start + tile, device=scores.device)
        visible = (ids[..., None, :] <= at[:, None]) & (ids >= 0)[..., None, :]
        yield start, ids, visible & (visible.cumsum(-1, dtype=torch.int32) <= size)
        best = ranked[..., : min(size, start + tile)]


def _block_counts(ids: Tensor, kept: Tensor, n_k: int, smooth: int) -> Int[Tensor, "b h t blocks"]:
    counts = torch.zeros(*kept.shape[:3], block_count(n_k, smooth), dtype=torch.int32, device=ids.device)
    where = (ids.clamp(min=0) // smooth)[..., None, :].expand(kept.shape)
    return counts.scatter_add_(-1, where, kept.int())
