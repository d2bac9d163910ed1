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
from foveate.patterns.bits import WORD, cells_of_bits, low_bits
from foveate.patterns.cells import Cells
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
    tops = list(_tops(scores.detach(), size, n_q, present, tile))
    if check_int(smooth, "smooth", 1) > 1:
        parts = []
        for first, ids in tops:
            kept = _kept(ids, *_limits(ids, torch.tensor(first, device=ids.device), size, tile))
            parts.append(_block_counts(ids, kept, n_k, smooth))
        counts = torch.cat(parts, 2)[:, :, :n_q] if parts else scores.new_zeros(*scores.shape[:2], 0, 0)
        return select_smooth(counts.long(), smooth, n_k, group=group, rows=tile)
    # Early tiles know fewer keys than their width and stay by themselves: all others have no absent key.
    shapes: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
    for cell in tops:
        shapes.setdefault((cell[1].shape[-1], cell[0] < size), []).append(cell)
    cells = []
    for same in shapes.values():
        firsts = torch.tensor([first for first, _ in same], device=scores.device)
        ids = torch.stack([ids for _, ids in same], dim=2)
        cells.append(_cells(ids, firsts, size, tile, group, n_q, n_k))
    nothing = torch.full((1, 1, 1, 1), -1, device=scores.device)
    return Selection.of_cells(cells or [Cells(nothing, nothing)], n_q * group, n_k)


def _cells(
    ids: Int[Tensor, "b h c w"],
    firsts: Int[Tensor, "c"],
    size: int,
    tile: int,
    group: int,
    n_q: int,
    n_k: int,
) -> Cells:
    """Make the cells of some tiles: pieces of at most 64 rows, all over the keys of their tile."""
    limit, since = _limits(ids, firsts, size, tile)
    pieces = -(-tile * group // WORD)
    rows = torch.arange(pieces * WORD, device=ids.device).view(pieces, WORD)[:, : tile * group]
    q_ids = (firsts - (n_k - n_q))[:, None, None] * group + rows
    q_ids = torch.where((rows < tile * group) & (q_ids < n_q * group), q_ids, -1)
    words = _words(limit, since, rows // group)
    words = words.masked_fill_((ids < 0)[:, :, :, None], 0)
    # No bit for rows that stand behind the end.
    words &= low_bits((q_ids >= 0).sum(-1))[..., None]
    shape = (*ids.shape[:3], pieces, ids.shape[3])
    k_ids = ids[:, :, :, None].expand(shape).flatten(2, 3)
    return cells_of_bits(q_ids.flatten(0, 1)[None, None], k_ids, words.flatten(2, 3))


def _limits(
    ids: Int[Tensor, "*lead w"], first: Int[Tensor, "*some"], size: int, tile: int
) -> tuple[Int[Tensor, "*lead t"], Int[Tensor, "*lead w"]]:
    """Return the column up to which each position takes all it can see, and since which position keys are seen.

    Args:
        ids: keys by rising rank, best first.
        first: first position of the tile.
        size: keys per query.
        tile: positions.
    """
    since = (ids - first[..., None]).clamp(min=0)
    own = ids >= first[..., None]
    # Where in the order each of the tile's own keys stands, and then those keys in the order.
    column = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    # Keys that nobody may take stand behind everything.
    place = torch.full((*ids.shape[:-1], tile + 1), ids.shape[-1] + size, device=ids.device)
    place = place.scatter_(-1, torch.where(own, since, tile), column)[..., :tile]
    place, position = place.sort(dim=-1)
    # Narrow numbers: as far as a tile from the last one is all that matters.
    small = torch.int16 if tile < 1 << 14 else torch.int64
    over = (place - size).clamp(-tile - 1, tile + 1).to(small)
    later = position.to(small)[..., None, :] > torch.arange(tile, dtype=small, device=ids.device)[:, None]
    # A later key of the tile that stands among what a query takes moves the last one it takes one on. As many
    # visible keys stand before the j-th of them as its column says, less j.
    number = later.cumsum(-1, dtype=small)
    pushed = later & (over[..., None, :] - number < -1)
    # They are the first of the later ones, so that the last one's number is how many they are.
    return size - 1 + (number * pushed).amax(-1).long(), since


def _kept(ids: Tensor, limit: Tensor, since: Tensor) -> Bool[Tensor, "*lead t w"]:
    """Return which position takes which key."""
    column = torch.arange(ids.shape[-1], device=ids.device)
    position = torch.arange(limit.shape[-1], device=ids.device)[:, None]
    kept = (column <= limit[..., None]) & (since[..., None, :] <= position)
    return kept & (ids >= 0)[..., None, :]


def _words(
    limit: Int[Tensor, "*lead t"], since: Int[Tensor, "*lead w"], rows: Int[Tensor, "pieces r"]
) -> Int[Tensor, "*lead pieces w"]:
    """Return `_kept` as words of the rows of every piece, `rows` the position of each."""
    lead, width = since.shape[:-1], since.shape[-1]
    pieces, count = rows.shape
    bits = torch.ones((), dtype=torch.int64, device=rows.device) << torch.arange(count, device=rows.device)
    positions = limit.shape[-1]
    real = rows < positions
    # Every row gives its bit to the last column it takes; sums from behind give it to all before it.
    last = limit[..., rows.clamp(max=positions - 1)].clamp(max=width - 1)
    until = torch.zeros(*lead, pieces, width, dtype=torch.int64, device=rows.device)
    until.scatter_add_(-1, last, torch.where(real, bits, 0).expand(last.shape))
    until = until.flip(-1).cumsum(-1).flip(-1)
    # The rows that stand at a position or behind it.
    behind = rows[:, None, :] >= torch.arange(positions, device=rows.device)[:, None]
    behind = (behind * bits).sum(-1)
    at = since.clamp(max=positions - 1)
    return until & behind.transpose(0, 1)[at].movedim(-1, -2)


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
) -> Iterator[tuple[int, Int[Tensor, "b h w"]]]:
    """Yield, for each tile of positions: its first position, and key ids by rising rank (-1 for none, at the end)."""
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
        yield start, order.gather(-1, ranked)
        best = ranked[..., : min(size, start + tile)]


def _block_counts(ids: Tensor, kept: Tensor, n_k: int, smooth: int) -> Int[Tensor, "b h t blocks"]:
    counts = torch.zeros(*kept.shape[:3], block_count(n_k, smooth), dtype=torch.int32, device=ids.device)
    where = (ids.clamp(min=0) // smooth)[..., None, :].expand(kept.shape)
    return counts.scatter_add_(-1, where, kept.int())
