"""Infinite self-attention (arXiv 2603.00175): the series, its linear stand-in, and what both cost."""

from collections.abc import Iterator

import torch
from torch.nn.functional import cosine_similarity

from benchmarks.papers import Figure
from foveate.kernels.flops import attention_flops
from foveate.mechanisms.projections import split_heads
from foveate.mechanisms.scored.infinite_self_attention import InfiniteSelfAttention, principal, walks


def figures() -> Iterator[Figure]:
    """Yield likeness to the eigenvector, the error of short walks, and multiply-adds."""
    torch.manual_seed(0)
    dim, heads, n = 256, 4, 196
    module = InfiniteSelfAttention(dim=dim, heads=heads, variant="linear").double()
    for claim, shift in (("random tokens", 0.0), ("random tokens around a common mean", 1.0)):
        x = torch.randn(4, n, dim, dtype=torch.float64) + shift * torch.randn(4, 1, dim, dtype=torch.float64)
        q, k = (split_heads(part(x), heads) for part in (module.q_proj, module.k_proj))
        target = principal((q @ k.mT).relu(), steps=200)
        likeness = cosine_similarity(module.weights(x, x).squeeze(-1), target, dim=-1)
        yield Figure(
            claim=f"cosine of the linear form's importances with the principal eigenvector, {claim}",
            paper="0.985",
            ours=f"{likeness.mean():.3f}",
            how=f"{n} tokens, {dim} channels, {heads} heads, initial weights; the paper's layers are trained",
        )
    pure = InfiniteSelfAttention(dim=dim, heads=heads).double()
    weights = pure.weights(x, x)
    limit, short, errors = walks(weights), weights, []
    for _ in range(4):
        errors.append(((limit - short).norm() / limit.norm()).item())
        short = weights + weights @ short
    yield Figure(
        claim="what one, two, three and four hops leave of the whole series",
        paper="depth supplies the hops",
        ours=", ".join(f"{error:.1%}" for error in errors),
        how="Frobenius norm of the rest over that of the series, rho = 0.95; tokens around a common mean",
    )
    for side in (32, 64, 576):
        counts = [adds(variant, side * side) for variant in ("softmax", "linear")]
        yield Figure(
            claim=f"multiply-adds of softmax attention over those of the linear form, {side * side:,} tokens",
            paper="13.4 times the throughput at 1024 x 1024 pixels; 9216 x 9216 runs",
            ours=f"{counts[0] / counts[1]:.1f}",
            how=f"one layer with projections, 768 channels, 12 heads, patches of 16, {16 * side} x {16 * side} pixels",
        )


def adds(kind: str, n: int) -> float:
    """Return the multiply-adds of one layer of 768 channels: projections, then the pairs of its `attend` calls."""
    dim, heads = 768, 12
    width, pairs = dim // heads, heads * n
    if kind == "softmax":
        attention = attention_flops(pairs * n, width, width)
    else:  # one mean query: its sum, its divisor, and the mean itself
        attention = attention_flops(pairs, width, width) + attention_flops(pairs, width, 1) + 2 * n * dim
    return 4 * n * dim * dim + attention / 2
