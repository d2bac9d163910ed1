"""As many of the best blocks as each row is told, where rows are many and most of them may choose among few.

Sorting all blocks of all rows costs more than attending to them, once every query chooses for itself. A choice needs
the last block that is taken and no order: rows of one count look for it together, among the blocks they may choose.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Pieces, at most, in which rows look for their best blocks.
_PIECES = 128


def choose_count(
    scores: Float[Tensor, "*batch rows k_blocks"],
    count: Int[Tensor, "#rows"],
    allowed: Bool[Tensor, "..."] | None = None,
) -> Bool[Tensor, "*batch rows k_blocks"]:
    """Choose the best blocks of every row, each row as many as it is told; ties keep the order of blocks.

    Args:
        scores: how much each block is wanted.
        count: how many each row takes, at least 1.
        allowed: blocks that may be chosen at all, broadcastable to `scores`.
    """
    rows, blocks = scores.shape[-2:]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if not scores.numel():
        return chosen
    count = count.clamp(max=blocks).expand(rows)
    wanted = None if allowed is None else allowed.expand(*allowed.shape[:-2], rows, blocks)
    # Rows of one count at a time where there are few counts. Rows that may choose among few blocks, as early
    # ones do, need not look at all.
    ends = [*((count[1:] != count[:-1]).nonzero().flatten() + 1).tolist(), rows]
    if len(ends) > _PIECES:
        ends = [rows * (i + 1) // _PIECES for i in range(_PIECES)]
    for first, end in pairwise([0, *ends]):
        if first == end:
            continue
        some, width, most = slice(first, end), blocks, count[first:end]
        part = scores[..., some, :]
        if wanted is not None:
            mine = wanted[..., some, :]
            there = mine.flatten(0, -2).any(0).nonzero()
            width = max(int(there[-1]) + 1 if len(there) else 0, int(most.max()))
            part = part[..., :width].masked_fill(~mine[..., :width], float("-inf"))
        best = _best(part, most)
        chosen[..., some, :width] = best if wanted is None else best & wanted[..., some, :width]
    return chosen


def _best(scores: Tensor, count: Int[Tensor, "rows"]) -> Bool[Tensor, "*batch rows k_blocks"]:
    """Mark the `count` best of every row."""
    most, same = int(count.max()), int(count.min()) == int(count.max())
    last = scores.topk(most, dim=-1, sorted=not same).values
    if same:
        last = last.amin(-1, keepdim=True)
    else:
        last = last.gather(-1, (count - 1)[:, None].expand(*last.shape[:-1], 1))
    better, equal = scores > last, scores == last
    missing = count[:, None] - better.float().sum(-1, keepdim=True)
    if not bool((equal.float().sum(-1, keepdim=True) == missing).all()):
        equal &= equal.cumsum(-1, dtype=torch.int32) <= missing
    return better | equal
