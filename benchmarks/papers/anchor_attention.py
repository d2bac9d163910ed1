"""AnchorAttention (arXiv 2505.23520): what stripes leave out that blocks must take, on maps with planted columns."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.patterns.basic import Causal
from foveate.routing.blocks import block_count
from foveate.routing.stripes import StripeRouter

N, WIDTH, BLOCK, STEP, THETA = 4096, 64, 32, 4, 4.0


def planted(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys (1, 1, N, D) with a strong start and 3 % of single keys that stand out."""
    q = 1.0 + 0.5 * torch.randn(1, 1, N, WIDTH, generator=generator)
    k = 0.5 * torch.randn(1, 1, N, WIDTH, generator=generator) - 0.3
    columns = torch.rand(N, generator=generator) < 0.03
    columns[:BLOCK] = True
    k[:, :, columns] += 1.0
    return q, k


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    q, k = planted(torch.Generator().manual_seed(0))
    scale = WIDTH**-0.5
    weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~Causal().dense(N), float("-inf")).softmax(-1)
    router = StripeRouter(block=BLOCK, step=STEP, theta=THETA)
    near = router.near(N).dense()
    far = router.select(q, k, router.anchors(q, k, scale), scale).dense()
    triangle = N * (N + 1) // 2
    seen = near | far
    recall = float((weights * seen).sum(-1).mean())
    how = f"{N} tokens, blocks of {BLOCK}, {STEP} to a run, theta {THETA:g}, 3 % of keys planted"
    yield Figure(
        claim="sparsity of the causal map, and recall of attention",
        paper="not given for such data",
        ours=f"{1 - int(seen.sum()) / triangle:.1%}, {recall:.1%}",
        how=how,
    )
    # The blocks that hold what was found, for runs of queries of the same length.
    runs, blocks = block_count(N, router.run), block_count(N, BLOCK)
    held = far[0, 0].unflatten(0, (runs, -1)).any(1).unflatten(1, (blocks, BLOCK)).any(2)
    whole = held.repeat_interleave(router.run, 0).repeat_interleave(BLOCK, 1) & Causal().dense(N) | near[0, 0]
    yield Figure(
        claim="sparsity when the same keys are taken in whole blocks",
        paper="lower than with stripes at equal recall",
        ours=f"{1 - int(whole.sum()) / triangle:.1%}",
        how=f"{how}; blocks of {BLOCK} keys that hold at least one that was found",
    )
    published = StripeRouter()
    n = 131072
    runs, length = n // published.run, published.run
    close = runs * length * (length + 1) // 2 + (n - length) * published.block
    searched = (runs * (runs - 1) // 2) * published.step * length - (
        n - length
    ) // published.block * published.block
    yield Figure(
        claim="pairs of passes one and two over those of causal attention at 128k",
        paper="not given",
        ours=f"{close / (n * (n + 1) // 2):.2%}, {searched / (n * (n + 1) // 2):.2%}",
        how="blocks of 128, 16 to a run; a pair of the search is one product where others are two",
    )
