"""Levels of blocks: how coarsely a query block sees each key block. 1 is whole, p pooled by p, 0 not at all.

Importance of blocks from a few sampled tokens, intervals of rank or of cumulated importance that get a level each,
and how far a block may be pooled because its keys are alike. As large as blocks x blocks; no gradient anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.patterns.pattern import check_int
from foveate.routing.blocks import block_count

# Sampled logits held at a time.
_CHUNK = 1 << 24


def sample_offsets(
    block: int, count: int, heads: tuple[int, int] = (1, 1), *, generator: torch.Generator | None = None
) -> Int[Tensor, "b h count"]:
    """Return which tokens of a block stand for it: `count` different places below `block`, for all blocks alike.

    Args:
        block: tokens of a block.
        count: how many are taken, at most `block`.
        heads: (batch elements, heads) that draw for themselves.
        generator: draws them at random; without one they are spread evenly, the same for all.

    Raises:
        ArgumentError: naming `count`.
    """
    if not 1 <= count <= block:
        raise bad("count", count, f"between 1 and the {block} tokens of a block")
    if generator is None:
        even = (torch.arange(count) * block + block // 2) // count
        return even.expand(1, 1, count)
    draws = torch.rand(*heads, block, generator=generator, device=generator.device)
    return draws.topk(count, dim=-1).indices


def _sampled(x: Float[Tensor, "b h n d"], block: int, offsets: Int[Tensor, "b h s"]) -> tuple[Tensor, Tensor]:
    """Return the sampled tokens (b, h, blocks, s, d) and their places; beyond the end the last token stands."""
    b, h, n, _ = x.shape
    starts = torch.arange(block_count(n, block), device=x.device) * block
    at = (starts[:, None] + offsets.to(x.device)[:, :, None, :]).clamp(max=n - 1)
    index = at.expand(b, h, -1, -1).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, index).unflatten(2, (len(starts), -1)), at


@torch.no_grad()
def sampled_importance(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    block_q: int,
    block_k: int,
    *,
    q_offsets: Int[Tensor, "#b #h s"],
    k_offsets: Int[Tensor, "#b #h_kv t"],
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h q_blocks k_blocks"]:
    """Return the largest weight between sampled tokens of every two blocks, relative to each query's largest.

    s_ij = scale q_i . k_j over the sampled tokens; the importance of a block is max_ij exp(s_ij - max_j' s_ij').
    There is no denominator: the best block of a row of blocks has importance 1.

    Args:
        q, k: per head.
        block_q, block_k: tokens per block; short last blocks repeat their last token.
        q_offsets, k_offsets: places in a block that are sampled (see `sample_offsets`).
        causal: sampled keys after a sampled query do not count; queries stand at the end of the keys.
        scale: of the logits, D**-0.5 by default.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    share = q.shape[1] // k.shape[1]
    some_q, q_at = _sampled(q.to(accumulation_dtype(q.dtype)), block_q, q_offsets)
    some_q = some_q * factor
    some_k, k_at = _sampled(k.to(some_q.dtype), block_k, k_offsets)
    some_k, k_at = (x.repeat_interleave(share, dim=1) if x.shape[1] > 1 else x for x in (some_k, k_at))
    blocks, taken = some_k.shape[2], some_k.shape[3]
    flat = some_k.flatten(2, 3).transpose(-2, -1)
    rows = max(1, _CHUNK // max(q.shape[0] * q.shape[1] * some_q.shape[3] * blocks * taken, 1))
    q_at = q_at + (k.shape[2] - q.shape[2])
    parts = []
    for first in range(0, some_q.shape[2], rows):
        piece = some_q[:, :, first : first + rows]
        logits = (piece.flatten(2, 3) @ flat).unflatten(2, piece.shape[2:4])
        if causal:
            late = k_at.flatten(2)[:, :, None, None, :] > q_at[:, :, first : first + rows, :, None]
            logits = logits.masked_fill(late, float("-inf"))
        # The exponential grows, so that it can wait until the maximum over a block's keys is known.
        best = logits.unflatten(-1, (blocks, taken)).amax(-1)
        top = best.amax(-1, keepdim=True) if blocks else best
        parts.append((best - top.masked_fill(top == float("-inf"), 0.0)).exp().amax(3))
    return torch.cat(parts, dim=2)


def rank_ends(n: int, ends: Mapping[int, float], align: Mapping[int, int] | None = None) -> list[int]:
    """Return up to which rank each level goes: the share `ends[level]` of `n` blocks, rounded down.

    Args:
        n: number of key blocks.
        ends: level -> cumulated share of blocks, ascending.
        align: level -> number of blocks whose multiple its interval must be: it is rounded up, and down at the
            end of the row.
    """
    found, start = [], 0
    for level, share in ends.items():
        step = 1 if align is None else align.get(level, 1)
        stop = min(n, int(n * share))
        if step > 1 and stop > start:
            stop = min(start - (start - stop) // step * step, n)
            stop = start + (stop - start) // step * step if stop == n else stop
        start = max(start, stop)
        found.append(start)
    return found


def mass_ends(
    scores: Float[Tensor, "*batch k_blocks"],
    ends: Mapping[int, float],
    align: Mapping[int, int] | None = None,
    *,
    least: float = 0.06,
) -> Int[Tensor, "*batch levels"]:
    """Return up to which rank each level goes, row by row: one block past the share `ends[level]` of the mass.

    Args:
        scores: importance >= 0, of which shares are taken.
        ends: level -> cumulated share of the row's sum, ascending.
        align: as in `rank_ends`.
        least: level 1 gets at least this share of the blocks, and one more.
    """
    n = scores.shape[-1]
    line = scores.sort(dim=-1, descending=True).values.cumsum(-1)
    ratio = line / line[..., -1:].clamp(min=torch.finfo(line.dtype).tiny)
    start = torch.zeros(scores.shape[:-1], dtype=torch.long, device=scores.device)
    found = []
    for level, share in ends.items():
        step = 1 if align is None else align.get(level, 1)
        inside = (ratio <= share + 1e-6).sum(-1)
        stop = torch.where(inside > 0, inside + 1, start)
        if step > 1:
            length = (stop - start).clamp(min=0)
            stop = (start - (-length).div(step, rounding_mode="floor") * step).clamp(max=n)
            whole = start + (stop - start).div(step, rounding_mode="floor") * step
            stop = torch.where(stop == n, whole, stop)
        else:
            stop = torch.maximum(stop.clamp(max=n), start)
            if level == 1:
                stop = stop.clamp(min=min(n, int(n * least) + 1))
        found.append(stop)
        start = stop
    return torch.stack(found, dim=-1)


def rank_lists(
    scores: Float[Tensor, "*batch k_blocks"], ends: Int[Tensor, "*#batch levels"]
) -> Int[Tensor, "*batch places"]:
    """Return the blocks of each row from the best on, with -1 after those of every level.

    Args:
        scores: importance.
        ends: up to which rank each level goes.

    Returns:
        (..., k_blocks + levels); what no level reaches stays 0.
    """
    n, levels = scores.shape[-1], ends.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ends = ends.to(scores.device).expand(*scores.shape[:-1], levels)
    rank = torch.arange(n, device=scores.device)
    level = (rank[:, None] >= ends[..., None, :]).sum(-1)
    # One place more than there is, for the blocks beyond the last end.
    place = torch.where(level < levels, rank + level, n + levels)
    lists = torch.zeros(*scores.shape[:-1], n + levels + 1, dtype=torch.long, device=scores.device)
    lists.scatter_(-1, place, order)
    lists.scatter_(-1, ends + torch.arange(levels, device=scores.device), -1)
    return lists[..., :-1]


@torch.no_grad()
def similar_levels(
    k: Float[Tensor, "b h n d"], block: int, thresholds: Mapping[int, float]
) -> Int[Tensor, "b h blocks"]:
    """Return by how much each block may be pooled because what would be averaged is alike.

    The level is the largest p for which the first and the last of every p consecutive keys have a mean cosine above
    `thresholds[p]`, and 1 where there is none. A short last block repeats its last key.

    Raises:
        ArgumentError: naming `block`, unless every level divides it.
    """
    check_levels(thresholds, block)
    n = k.shape[2]
    at = torch.arange(block_count(n, block) * block, device=k.device).clamp(max=n - 1)
    blocks = k[:, :, at].unflatten(2, (-1, block))
    found = torch.ones(blocks.shape[:3], dtype=torch.long, device=k.device)
    for level in sorted(thresholds):
        ends = blocks[..., ::level, :], blocks[..., level - 1 :: level, :]
        alike = functional.cosine_similarity(*ends, dim=-1).mean(-1)
        found = torch.where(alike > thresholds[level], level, found)
    return found


def keep_last(
    levels: Int[Tensor, "*batch k_blocks"], tokens: int, block: int
) -> Int[Tensor, "*batch k_blocks"]:
    """Return the levels with 1 for the last ceil(tokens / block) key blocks: text behind a video."""
    last = block_count(tokens, block)
    here = torch.arange(levels.shape[-1], device=levels.device) >= levels.shape[-1] - last
    return levels.masked_fill(here, 1)


def listed_blocks(chosen: Bool[Tensor, "*batch k_blocks"]) -> Int[Tensor, "*batch m"]:
    """Return the ids of the chosen blocks, in order, -1 behind them where other rows have more."""
    count = chosen.sum(-1, keepdim=True)
    most = int(count.max()) if count.numel() else 0
    front = (~chosen).long().argsort(dim=-1, stable=True)[..., :most]
    return torch.where(torch.arange(most, device=chosen.device) < count, front, -1)


def check_levels(levels: Mapping[int, float], block: int) -> None:
    """Raise an ArgumentError unless all levels are positive integers that divide `block`."""
    for level in levels:
        if check_int(level, "levels", 1) and block % level:
            raise bad("block", block, f"a multiple of {level}, by which blocks are pooled")


def level_density(levels: Int[Tensor, "*batch k_blocks"]) -> float:
    """Return which part of dense attention's pairs is left: the mean of 1 / level, 0 for level 0."""
    pooled = levels.clamp(min=1).to(torch.float64)
    return float(((levels > 0) / pooled).mean())


def alignment(levels: Mapping[int, float], block: int, tile: int) -> dict[int, int]:
    """Return, for every level, how many pooled blocks fill a tile of `tile` keys (at least 1)."""
    per_block = max(block // check_int(tile, "tile", 1), 1)
    return {level: max(math.ceil(level / per_block), 1) for level in levels}
