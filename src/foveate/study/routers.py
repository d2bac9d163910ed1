"""Content candidates of `recall`: the library's routers that are training-free functions of q and k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from foveate.core.errors import bad
from foveate.mechanisms.routed.anchor_attention import select_keys
from foveate.mechanisms.routed.hip_attention import hip_selection
from foveate.patterns.basic import SlidingWindow
from foveate.patterns.cells import Cells
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.routing.blocks import causal_blocks, choose_top, pool_blocks, select_blocks
from foveate.routing.clusters import OnlineKMeans, on_sphere, top_members
from foveate.routing.levels import sample_offsets, sampled_importance
from foveate.routing.regions import Regions, select_regions, top_regions
from foveate.routing.spans import Stripe, search_spans, select_spans
from foveate.routing.stripes import StripeRouter
from foveate.routing.truth import block_weights
from foveate.study.candidates import Router, Setting, family

Members = Iterator[tuple[str, Router]]
_REGIONS = 64
_KMEANS_STEPS = 5
# The paper takes two or three.
_SPANS = 8


@family("regions", kind="content")
def regions(setting: Setting) -> Members:
    """Yield the top regions of pooled keys for each region of pooled queries (BiFormer), per head.

    Raises:
        ArgumentError: naming `causal`.
    """
    if setting.causal:
        raise bad(
            "causal",
            True,
            "False",
            "Regions would be spent on later tokens; 'blocks by mean' leaves these out.",
        )
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


def _blocks(setting: Setting, how: str, score: Callable[[Tensor, Tensor, int], Tensor]) -> Members:
    """Yield the blocks that `score(q, k, block)` (B, H, blocks, blocks) puts first, and the query's own.

    Causal: among blocks that are not wholly later.
    """
    n = setting.n
    block = max(1, min(64, n // 32))
    count = math.ceil(n / block)
    for share in setting.budgets:
        top = max(1, round(share * count))

        def choose(q: Tensor, k: Tensor, top: int = top) -> Selection:
            own = torch.eye(count, dtype=torch.bool, device=q.device)
            allowed = causal_blocks(n, n, block, block, device=q.device) if setting.causal else None
            chosen = choose_top(score(q, k, block).masked_fill(own, float("inf")), top, allowed)
            return select_blocks(chosen, block, block, n, n, causal=setting.causal)

        yield f"top {top} of {count} blocks of {block}, {how}", choose


@family("blocks by mean", kind="content")
def blocks_by_mean(setting: Setting) -> Members:
    """Yield the blocks whose mean keys fit a block's mean query best (as MoBA and others pool)."""
    return _blocks(
        setting, "by mean", lambda q, k, size: pool_blocks(q, size) @ pool_blocks(k, size).transpose(-1, -2)
    )


@family("blocks by sample", kind="content")
def blocks_by_sample(setting: Setting) -> Members:
    """Yield the blocks in which a quarter of the tokens find the largest weights (Pyramid Sparse Attention)."""

    def score(q: Tensor, k: Tensor, size: int) -> Tensor:
        some = sample_offsets(size, max(1, size // 4)).to(q.device)
        return sampled_importance(q, k, size, size, q_offsets=some, k_offsets=some, causal=setting.causal)

    return _blocks(setting, "by sample", score)


@family("blocks by largest weight", kind="content")
def blocks_by_largest_weight(setting: Setting) -> Members:
    """Yield the blocks that hold the largest weights: what a learned gate aims at (SeerAttention).

    Choosing costs as much as full attention; it shows what a router of blocks could come to.
    """
    return _blocks(
        setting,
        "by largest weight",
        lambda q, k, size: block_weights(q, k, size, size, causal=setting.causal),
    )


@family("tree search", kind="content")
def tree_search(setting: Setting) -> Members:
    """Yield the keys a binary search over segments finds, sinks and a window (HiP).

    Raises:
        ArgumentError: naming `causal`.
    """
    _needs_causal(setting, "The search is made for keys that lie before a query.")
    block_q = max(1, min(32, setting.n // 64))
    for share in setting.budgets:
        total = setting.keys(share)
        block_k = max(1, min(8, total // 16))
        window = max(block_q, total // 4)
        keys = max(block_k, total - window - block_k)

        def choose(q: Tensor, k: Tensor, keys=keys, block_k=block_k, window=window) -> Selection:
            return hip_selection(
                q, k, keys=keys, block_q=block_q, block_k=block_k, group=1, window=window, sink=block_k
            )[1]

        yield f"{keys} keys in blocks of {block_k} for {block_q} queries, window {window}", choose


@family("stripes", kind="content")
def stripes(setting: Setting) -> Members:
    """Yield single keys that come near an anchor, the first ones and those nearby (AnchorAttention).

    Its budget is a distance of logits, not a number of pairs: one member for each of five.

    Raises:
        ArgumentError: naming `causal`.
    """
    _needs_causal(setting, "Anchors are taken from keys before a query.")
    n = setting.n
    block = max(4, min(128, 1 << max(0, round(math.log2(n) / 2) - 1)))
    for theta in (0.0, 1.0, 2.0, 4.0, 6.0):
        router = StripeRouter(block, 4, theta)

        def choose(q: Tensor, k: Tensor, router: StripeRouter = router) -> Selection:
            near, far = select_keys(q, k, router)
            return Selection.of_cells([*near.cells, *far.cells], n, n)

        yield f"theta {theta:g}, blocks of {block}, 4 to a run", choose


@family("spans", kind="content")
def spans(setting: Setting) -> Members:
    """Yield spans behind the best anchors of a power-law stripe, and a window (Superlinear Attention).

    The paper learns queries of their own for the search and mixes the spans by gates; here q searches, and one
    softmax goes over all spans.

    Raises:
        ArgumentError: naming `causal`.
    """
    _needs_causal(setting, "Anchors stand before a query.")
    n, stripe = setting.n, Stripe()
    length = max(1, math.ceil(stripe.backward * n**stripe.span_power))
    for share in setting.budgets:
        count = max(1, min(_SPANS, round((setting.keys(share) - stripe.window) / length)))

        def choose(q: Tensor, k: Tensor, count: int = count) -> Selection:
            found = select_spans(search_spans(q, k, stripe, spans=count), n, stripe)
            # The spans of a head may overlap; each of them is a head of its own there.
            cells = [
                Cells(*(x.unflatten(1, (-1, count)).flatten(2, 3) for x in _whole(cell)))
                for cell in found.cells
            ]
            return Selection.of_cells(cells, n, n).distinct() | SlidingWindow(stripe.window - 1)

        yield f"{count} spans of {length} at most, window {stripe.window}", choose


def _whole(cells: Cells) -> tuple[Tensor, Tensor]:
    b, h = cells.k_ids.shape[:2]
    return cells.q_ids.expand(b, h, -1, -1), cells.k_ids


def _needs_causal(setting: Setting, hint: str) -> None:
    if not setting.causal:
        raise bad("causal", False, "True", hint)


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
