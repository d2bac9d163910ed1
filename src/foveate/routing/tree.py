"""Top key blocks of every query block by a binary search over segments, all of them at once.

The keys that a query block may choose from are cut into M equal segments. Each is split in two, one representative
block per half is scored, the best M halves are kept, and so on until segments are single blocks: log2(blocks / M)
rounds of 2 M scores, where scoring all would take as many as there are blocks. Where that is not many more, all of
them are scored by products of matrices, in pieces, and the same search looks its scores up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import bad
from foveate.patterns.pattern import check_int
from foveate.routing.block_scores import AskedBlocks, Lookup, Table
from foveate.routing.blocks import block_count, pool_blocks

_NEVER = float("-inf")


class Found(NamedTuple):
    """What the search kept.

    Attributes:
        starts: first key of each kept block, ascending; entries from `count` on mean nothing.
        count: how many blocks each query block kept.
    """

    starts: Int[Tensor, "b h q_blocks m"]
    count: Int[Tensor, "q_blocks"]


def search_rounds(blocks: int, keep: int) -> int:
    """Return how often segments are halved until `keep` of them, laid over `blocks`, are single blocks."""
    return max(math.ceil(blocks / max(keep, 1)) - 1, 0).bit_length()


def search_products(n: int, *, keep: int, block_q: int, block_k: int, group: int, window: int) -> int:
    """Return how many (query, key) products the search takes over a sequence of n tokens, to price it.

    Where looking up so many representatives takes longer than scoring all blocks, `search_tree` does the latter.
    """
    total = 0
    for end in range(block_q, n + block_q, block_q):
        units = -(-max(min(end, n) - window, 0) // group)
        if units > keep * block_k:
            rounds = search_rounds(block_count(units, block_k), keep)
            total += rounds * 2 * keep * block_k * block_q * (2 if group > 1 else 1)
    return total


@torch.no_grad()
def search_tree(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    *,
    keys: int,
    block_q: int,
    block_k: int,
    group: int = 1,
    window: int = 0,
    oracle: bool = False,
    official: bool = False,
) -> Found:
    """Find the blocks of keys that fit a block of queries best. No gradient.

    Queries stand at the end of the keys. A query block chooses among the keys that end `window` tokens before the
    end of the block.

    Args:
        q, k: queries and keys; H_kv divides H.
        keys: how many keys a query block keeps: M = ceil(keys / group / block_k) blocks.
        block_q: queries per block.
        block_k: units per key block.
        group: keys per unit. With more than one a unit is scored by the elementwise minimum and maximum of its
            keys, whichever fits better.
        window: keys at the end of what a query block sees that are not searched.
        oracle: score a half by its best block instead of by one representative. As dear as scoring everything.
        official: the authors' choices. Only the odd rows of a query block ask (so none when it has one), the
            first block represents a half and not its centre, the search ends when segments have one block on
            average, `window` counts units, and an oracle's scores are at least 0.

    Raises:
        ArgumentError: naming the argument that makes no sense.
    """
    for name, value in (("keys", keys), ("block_q", block_q), ("block_k", block_k), ("group", group)):
        check_int(value, name, 1)
    check_int(window, "window", 0)
    if keys < group:
        raise bad("keys", keys, f"at least one unit of group={group} keys")
    n_q, n_k = q.shape[2], k.shape[2]
    if n_q > n_k:
        raise bad("q", tuple(q.shape), f"at most {n_k} queries, as they stand at the end of the keys")
    if official and block_q < 2:
        raise bad("block_q", block_q, "at least 2 with official=True", "The authors ask odd rows only.")
    units = (
        k if group == 1 else torch.cat([pool_blocks(k, group, "min"), pool_blocks(k, group, "max")], dim=-1)
    )
    most = keys // group
    slots, n_blocks = block_count(most, block_k), block_count(n_q, block_q)
    # Units that each query block sees, and how many of them it may choose from.
    ends = [(j + 1) * block_q + n_k - n_q for j in range(n_blocks)]
    if official:
        visible = [min(end // group, units.shape[2]) for end in ends]
        area = [max(seen - window, 0) for seen in visible]
    else:
        visible = area = [-(-max(min(end, n_k) - window, 0) // group) for end in ends]
    # Query blocks that may choose from few units keep them all, in order; those behind them search.
    free = sum(a <= most for a in area)
    counts = [block_count(a, block_k) for a in area]
    starts = [torch.arange(slots, dtype=torch.int32, device=q.device).expand(*q.shape[:2], free, -1)]
    if free < n_blocks:
        asked, absent = _asked(q, block_q, free, official)
        blocks = AskedBlocks(asked, absent, units, visible[free:], counts[free:], block_k, group > 1)

        def looked_up(most: int) -> int:
            return search_rounds(most, slots) * 2 * slots

        for scorer, sizes in blocks.parts(None if oracle else looked_up):
            starts.append(_halve(scorer, sizes, slots, oracle, official))
    count = [min(n, slots) for n in counts]
    whole = torch.cat(starts, dim=2).long().mul_(block_k * group)
    return Found(whole, torch.tensor(count, dtype=torch.long, device=q.device))


def _asked(q: Tensor, block_q: int, free: int, official: bool) -> tuple[Tensor, Tensor | None]:
    """Return the rows that ask, (b, h, q_blocks, rows, d), and which of them are beyond the last query (or None)."""
    n_q = q.shape[2]
    asked = functional.pad(q[:, :, free * block_q :], (0, 0, 0, -n_q % block_q)).unflatten(2, (-1, block_q))
    absent = None
    if n_q % block_q:
        absent = torch.arange(free * block_q, n_q - n_q % -block_q, device=q.device).view(-1, block_q) >= n_q
    if official:
        asked, absent = asked[:, :, :, 1::2], None if absent is None else absent[:, 1::2]
    return asked, absent


def _halve(
    scorer: Table | Lookup, blocks: Int[Tensor, "q_blocks"], slots: int, oracle: bool, official: bool
) -> Int[Tensor, "b h q_blocks m"]:
    """Return the blocks that the search keeps of the first `blocks` of each query block, ascending."""
    share = blocks.double() / slots
    edges = (share[:, None] * torch.arange(slots + 1, device=blocks.device)).long()
    index = edges[:, :-1].expand(*scorer.lead, -1, -1)
    size = (edges[:, 1:] - edges[:, :-1]).expand(index.shape)
    for stage in range(search_rounds(scorer.most, slots)):
        half = size >> 1
        start = torch.cat([index, index + half], dim=-1)
        length = torch.cat([half, size - half], dim=-1)
        if oracle:
            assert isinstance(scorer, Table)
            scores = scorer.best(start, length)
            scores = scores.clamp(min=0) if official else scores
        else:
            scores = scorer.of(start if official else start + (length >> 1))
        # Of 2 M halves at least M have a block.
        chosen = scores.masked_fill_(length < 1, _NEVER).topk(slots, dim=-1, sorted=False).indices
        start, length = start.gather(-1, chosen), length.gather(-1, chosen)
        if official:
            # Theirs stops where segments have one block on average; ours where all of them have one.
            active = (share / 2**stage > 1)[:, None]
            start, length = torch.where(active, start, index), torch.where(active, length, size)
        index, size = start, length
    # Narrow numbers are sorted several times as fast.
    return index.int().sort(dim=-1).values
