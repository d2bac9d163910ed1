"""Top key blocks of every query block by a binary search over segments, all of them at once.

The keys that a query block may choose from are cut into M equal segments. Each is split in two, one representative
block per half is scored, the best M halves are kept, and so on until segments are single blocks: log2(blocks / M)
rounds of 2 M scores, where scoring all would take as many as there are blocks.
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
from foveate.routing.blocks import block_count, pool_blocks

# Numbers gathered at a time.
_CHUNK = 1 << 22
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
    """Return how many (query, key) products the search takes over a sequence of n tokens, to price it."""
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
    (n_q, d), n_k = q.shape[2:], k.shape[2]
    if n_q > n_k:
        raise bad("q", tuple(q.shape), f"at most {n_k} queries, as they stand at the end of the keys")
    if official and block_q < 2:
        raise bad("block_q", block_q, "at least 2 with official=True", "The authors ask odd rows only.")
    units = (
        k if group == 1 else torch.cat([pool_blocks(k, group, "min"), pool_blocks(k, group, "max")], dim=-1)
    )
    most = keys // group
    slots = block_count(most, block_k)
    ends = torch.arange(1, block_count(n_q, block_q) + 1, device=q.device) * block_q + (n_k - n_q)
    if official:
        visible = (ends // group).clamp(max=units.shape[2])
        area = (visible - window).clamp(min=0)
    else:
        area = -(-(ends.clamp(max=n_k) - window).clamp(min=0) // group)
        visible = area
    asked = functional.pad(q, (0, 0, 0, -n_q % block_q)).unflatten(2, (-1, block_q))
    rows = torch.arange(ends.shape[0] * block_q, device=q.device).view(-1, block_q) < n_q
    if official:
        asked, rows = asked[:, :, :, 1::2], rows[:, 1::2]
    scorer = _Scorer(asked, rows, units, visible, block_k, d, group > 1)
    blocks = -(-area // block_k)
    slot = torch.arange(slots, device=q.device)
    edges = (blocks.double() / slots)[:, None] * torch.arange(slots + 1, device=q.device)
    edges = edges.long()
    whole = area <= most
    # Who keeps everything has the blocks in order.
    index = torch.where(whole[:, None], slot, edges[:, :-1]).expand(*q.shape[:2], -1, -1)
    size = torch.where(whole[:, None], 1, edges[:, 1:] - edges[:, :-1]).expand(index.shape)
    largest = block_count(units.shape[2], block_k)
    share = blocks.double() / slots
    for stage in range(search_rounds(largest, slots)):
        # Theirs stops where segments have one block on average; ours where all of them have one.
        active = (~whole & (share / 2**stage > 1)) if official else ~whole
        left = torch.stack([index, index + size // 2], dim=-1).flatten(-2)
        right = torch.stack([size // 2, size - size // 2], dim=-1).flatten(-2)
        scores = scorer.best(left, right) if oracle else scorer.of(left if official else left + right // 2)
        if oracle and official:
            scores = scores.clamp(min=0)
        scores = scores.masked_fill(right < 1, _NEVER)
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
        index = torch.where(active[:, None], left.gather(-1, chosen), index)
        size = torch.where(active[:, None], right.gather(-1, chosen), size)
    starts = index.sort(dim=-1).values * (block_k * group)
    return Found(starts, torch.where(whole, blocks, slots))


class _Scorer:
    """Scores key blocks for query blocks, by the best product of any of their rows."""

    def __init__(
        self, asked: Tensor, rows: Tensor, units: Tensor, visible: Tensor, block_k: int, d: int, paired: bool
    ):
        self.asked, self.rows, self.units, self.visible = asked, rows, units, visible
        self.block_k, self.d, self.paired = block_k, d, paired

    def of(self, blocks: Int[Tensor, "b h q_blocks m"]) -> Float[Tensor, "b h q_blocks m"]:
        """Return the scores of blocks, -inf for blocks that have no visible unit."""
        b, h, _, m = blocks.shape
        step = max(1, _CHUNK // max(b * h * m * self.block_k * self.units.shape[-1], 1))
        parts = [self._chunk(blocks[:, :, at : at + step], at) for at in range(0, blocks.shape[2], step)]
        return torch.cat(parts, dim=2)

    def best(
        self, first: Int[Tensor, "b h q_blocks m"], size: Int[Tensor, "b h q_blocks m"]
    ) -> Float[Tensor, "b h q_blocks m"]:
        """Return the best score of any block of the segments."""
        every = torch.arange(block_count(self.units.shape[2], self.block_k), device=first.device)
        table = functional.pad(self.of(every.expand(*first.shape[:3], -1)), (0, 1), value=_NEVER)
        out = torch.full(first.shape, _NEVER, dtype=table.dtype, device=first.device)
        for shift in range(int(size.max()) if size.numel() else 0):
            at = torch.where(shift < size, first + shift, every.numel()).clamp(max=every.numel())
            out = torch.maximum(out, table.gather(-1, at))
        return out

    def _chunk(self, blocks: Tensor, at: int) -> Tensor:
        b, h, c, m = blocks.shape
        n = self.units.shape[2]
        unit = blocks[..., None] * self.block_k + torch.arange(self.block_k, device=blocks.device)
        there = unit < self.visible[at : at + c, None, None]
        batch = torch.arange(b, device=blocks.device).view(b, 1, 1, 1, 1)
        head = torch.arange(h, device=blocks.device).view(h, 1, 1, 1) // (h // self.units.shape[1])
        keys = self.units[batch, head, unit.clamp(max=max(n - 1, 0))]  # (b, h, c, m, block_k, d or 2 d)
        asked = self.asked[:, :, at : at + c]
        sides = keys.split(self.d, dim=-1) if self.paired else [keys]
        products = [asked @ side.flatten(3, 4).transpose(-1, -2) for side in sides]
        best = products[0] if len(products) == 1 else torch.maximum(*products)
        best = (
            best.masked_fill(~self.rows[at : at + c, :, None], _NEVER).amax(-2).view(b, h, c, m, self.block_k)
        )
        return best.masked_fill(~there, _NEVER).amax(-1)
