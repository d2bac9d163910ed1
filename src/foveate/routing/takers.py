"""Blocks of keys and the single queries that take them: cells that hold no pair that nobody asked for.

Neighbouring queries that choose for themselves agree on little, and a cell of them would hold whatever any of them
takes. A block of keys, however, has many takers, and all of them see all of it. So here a cell is a block with up to
64 queries that took it, and a query stands in as many cells as it takes blocks: a softmax over all of its keys is put
together from one for every cell (combine="lse").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from foveate.core.errors import bad
from foveate.patterns.bits import WORD
from foveate.patterns.cells import Cells, cells_of
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection
from foveate.routing.blocks import block_count, causal_blocks, select_blocks

# Takers of a cell stand in one stretch of this many queries, so that what their cells say can be put together a
# stretch at a time.
_BITS = 10
STRETCH = 1 << _BITS
# Cells of neighbouring queries may hold this many times the pairs that were taken before cells of takers are made,
# whose parts have to be merged.
_WASTE = 1.6


def select_takers(
    chosen: Bool[Tensor, "b h n_q k_blocks"], block: int, n_q: int, n_k: int, *, causal: bool = False
) -> Selection:
    """Return the selection in which every query attends to the tokens of its chosen key blocks, a cell per block.

    Args:
        chosen: True at chosen blocks. B and H may be 1.
        block: tokens per key block; the last one may be shorter.
        n_q, n_k: numbers of tokens.
        causal: take away keys after the query's own position, n_k - n_q + i.

    Raises:
        ArgumentError: naming `chosen` when its shape does not fit, or a length or size.
    """
    blocks = block_count(n_k, block)
    check_int(n_q, "n_q", 0)
    if chosen.ndim != 4 or chosen.dtype != torch.bool or chosen.shape[2:] != (n_q, blocks):
        what = f"booleans (B, H, {n_q}, {blocks})"
        raise bad("chosen", f"{chosen.dtype} of shape {tuple(chosen.shape)}", what)
    cells = []
    if causal:
        whole = causal_blocks(n_q, n_k, 1, block, whole=True, device=chosen.device)
        cells = _diagonal(chosen, block, n_q, n_k)
        chosen = chosen & whole
    cells += _takers(chosen, block, n_k)
    nothing = torch.full((1, 1, 1, 1), -1, device=chosen.device)
    return Selection.of_cells(cells or [Cells(nothing, nothing)], n_q, n_k)


def select_alone(
    chosen: Bool[Tensor, "b h n_q k_blocks"],
    block: int,
    n_q: int,
    n_k: int,
    *,
    causal: bool = False,
    rows: int = 16,
) -> Selection:
    """Return the selection of queries that choose blocks for themselves, in the cells that suit what they chose.

    Where neighbours choose much alike, `rows` of them share a cell with all blocks that one of them takes
    (`select_blocks`); where they do not, blocks share a cell with their takers (`select_takers`). Looks at the
    choice, and waits for the device.

    Args:
        chosen, block, n_q, n_k, causal: as in `select_takers`.
        rows: queries of a cell of neighbours.
    """
    check_int(rows, "rows", 1)
    some = chosen
    if causal and chosen.ndim == 4 and chosen.shape[2:] == (n_q, block_count(n_k, block)):
        some = chosen & causal_blocks(n_q, n_k, 1, block, device=chosen.device)
    together = pad(some, (0, 0, 0, -n_q % rows)).unflatten(2, (-1, rows)).any(3)
    if rows * int(together.count_nonzero()) > _WASTE * int(some.count_nonzero()):
        return select_takers(chosen, block, n_q, n_k, causal=causal)
    return select_blocks(chosen, 1, block, n_q, n_k, causal=causal, rows=rows)


def _tokens(block: Int[Tensor, "*lead"], size: int, n: int) -> Int[Tensor, "*lead size"]:
    ids = block[..., None] * size + torch.arange(size, device=block.device)
    return ids.masked_fill((block[..., None] < 0) | (ids >= n), -1)


def _diagonal(chosen: Bool[Tensor, "b h n_q blocks"], block: int, n_q: int, n_k: int) -> list[Cells]:
    """Return cells of the queries that stand inside of a block they take, of which they see a part."""
    device, numbers = chosen.device, torch.arange(chosen.shape[3], device=chosen.device)
    k_ids = _tokens(numbers, block, n_k)
    q_ids = k_ids - (n_k - n_q)
    # The last query of a block sees all of it.
    partly = (k_ids >= 0) & (q_ids >= 0) & (k_ids % block < block - 1) & (k_ids < n_k - 1)
    if not bool(partly.any()):
        return []
    q_ids = torch.where(partly & chosen[:, :, q_ids.clamp(min=0), numbers[:, None]], q_ids, -1)
    past = torch.ones(block, block, dtype=torch.bool, device=device).tril()
    return [cells_of(q_ids, k_ids[None, None], past)]


def _takers(chosen: Bool[Tensor, "b h n_q blocks"], block: int, n_k: int) -> list[Cells]:
    """Return cells of blocks and up to 64 queries of a stretch that take them."""
    b, h, n_q, blocks = chosen.shape
    device, stretches = chosen.device, block_count(n_q, STRETCH)
    if not n_q or not blocks:
        return []
    table = pad(chosen, (0, 0, 0, -n_q % STRETCH)).unflatten(2, (stretches, STRETCH)).transpose(3, 4)
    # Taken places as one line, by (b, h), stretch, block and query.
    found = table.reshape(-1).nonzero().flatten()
    takers = (found >> _BITS).bincount(minlength=b * h * stretches * blocks)
    # Cells of one (b, h): as many as its blocks need, in the order of stretches and blocks.
    need = (-(-takers // WORD)).view(b * h, -1)
    most = int(need.sum(1).max()) if found.numel() else 0
    if not most:
        return []
    leads = torch.arange(b * h, device=device)[:, None] * most
    first = (need.cumsum(1) - need + leads).flatten()
    start = takers.cumsum(0) - takers
    place = torch.arange(len(found), device=device) + (first * WORD - start).repeat_interleave(takers)
    stretch = torch.arange(stretches, device=device).repeat_interleave(blocks).repeat(b * h) << _BITS
    q_ids = torch.full((b * h * most * WORD,), -1, device=device)
    q_ids[place] = (found & (STRETCH - 1)) + stretch.repeat_interleave(takers)
    need = need.flatten()
    cell = torch.arange(int(need.sum()), device=device) + (first - need.cumsum(0) + need).repeat_interleave(
        need
    )
    number = torch.full((b * h * most,), -1, device=device)
    number[cell] = torch.arange(blocks, device=device).repeat(b * h * stretches).repeat_interleave(need)
    q_ids, k_ids = q_ids.view(b, h, most, WORD), _tokens(number.view(b, h, most), block, n_k)
    return [Cells(q_ids, k_ids)]
