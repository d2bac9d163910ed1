"""Content candidates of `recall`: the library's routers that are training-free functions of q and k."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.routing.blocks import causal_blocks, choose_top, pool_blocks, select_blocks
from foveate.routing.clusters import OnlineKMeans, on_sphere, top_members
from foveate.routing.regions import Regions, select_regions, top_regions
from foveate.study.candidates import Router, Setting, family

Members = Iterator[tuple[str, Router]]
_REGIONS = 64
_KMEANS_STEPS = 5


@family("regions", kind="content")
def regions(setting: Setting) -> Members:
    """Yield the top regions of pooled keys for each region of pooled queries (BiFormer), per head.

    Raises:
        ArgumentError: naming `causal`.
    """
    if setting.causal:
        raise bad("causal", True, "False", "A region is pooled over tokens that come later.")
    grid = setting.grid
    per_axis = [max(1, min(side, round(_REGIONS ** (1 / grid.ndim)))) for side in grid]
    cut = Regions.of_count(grid, per_axis)
    for share in setting.budgets:
        top = max(1, min(cut.numel, round(share * cut.numel)))

        def choose(q: Tensor, k: Tensor, top: int = top) -> Selection:
            pooled = [cut.pool(x.flatten(0, 1)) for x in (q, k)]
            chosen = top_regions(pooled[0], pooled[1], top)[1]
            cells = select_regions(cut, chosen).cells[0]
            k_ids = cells.k_ids.reshape(*q.shape[:2], *cells.k_ids.shape[2:])
            return Selection(cells.q_ids[:1], k_ids, n_q=setting.n, n_k=setting.n)

        yield f"top {top} of {cut.numel} regions", choose


@family("top blocks", kind="content")
def top_blocks(setting: Setting) -> Members:
    """Yield the top blocks of averaged keys for each block of averaged queries, and the query's own block.

    Causal: among blocks that are not wholly later.
    """
    n = setting.n
    block = max(1, min(64, n // 32))
    count = math.ceil(n / block)
    for share in setting.budgets:
        top = max(1, round(share * count))

        def choose(q: Tensor, k: Tensor, top: int = top) -> Selection:
            scores = pool_blocks(q, block) @ pool_blocks(k, block).transpose(-1, -2)
            own = torch.eye(count, dtype=torch.bool, device=q.device)
            allowed = causal_blocks(n, n, block, block, device=q.device) if setting.causal else None
            chosen = choose_top(scores.masked_fill(own, float("inf")), top, allowed)
            return select_blocks(chosen, block, block, n, n, causal=setting.causal)

        yield f"top {top} of {count} blocks of {block}", choose


@family("clusters", kind="content")
def clusters(setting: Setting) -> Members:
    """Yield the top queries and keys of k-means centroids on the sphere (Routing Transformer).

    The paper learns the centroids over a training run; here a few steps of k-means on the very q and k stand
    in. A query may be in several clusters or in none, and its outputs are averaged, as published.
    """
    n = setting.n
    for share in setting.budgets:
        # c centroids with w members each compute c w^2 pairs, and reach each token twice when c w = 2 n.
        count = max(1, min(n, round(4 / share)))
        size = max(1, min(n, round(n * math.sqrt(share / count))))

        def choose(q: Tensor, k: Tensor, count: int = count, size: int = size) -> Selection:
            ids = [_clustered(one_q, one_k, count, size) for one_q, one_k in zip(q, k, strict=True)]
            q_ids, k_ids = (torch.cat([pair[side] for pair in ids]) for side in (0, 1))
            return Selection(q_ids, k_ids, n_q=n, n_k=n, combine=Mean(1e-2))

        yield f"{count} clusters of {size}", choose


def _clustered(q: Tensor, k: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the top queries and keys, (1, H, count, size), of centroids fitted to q and k (H, N, D)."""
    heads, n, width = q.shape
    q, k = on_sphere(q.float())[None], on_sphere(k.float())[None]
    both = torch.cat([q, k], dim=2)
    means = OnlineKMeans(heads, count, width, decay=0.0).to(q.device)
    # Evenly spaced tokens to begin with: the same choice every time, and no cluster begins empty.
    start = torch.arange(count, device=q.device) * (2 * n) // count
    means.means.copy_(both[0, :, start])
    for _ in range(_KMEANS_STEPS):
        means.update(both)
    return top_members(means(q), size), top_members(means(k), size)
