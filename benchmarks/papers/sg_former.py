"""SG-Former: keys of a guided layer, pairs of a stage, and parameters of its blocks."""

from collections.abc import Iterator

from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.routed.sg_former import (
    RATES,
    EnhancedAttention,
    GuidedAttention,
    HybridScaleAttention,
)

DIMS, HEADS, DEPTHS, REDUCTIONS = (64, 128, 256, 512), (2, 4, 8, 16), (2, 4, 16, 1), (8, 4, 2, 1)


def count(*modules: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def convolution(before: int, after: int, side: int, groups: int = 1) -> int:
    """Parameters of a convolution without bias and its group norm."""
    return count(nn.Conv2d(before, after, side, groups=groups, bias=False), nn.GroupNorm(1, after))


def parameters(classes: int = 1000, mlp_ratio: int = 4) -> int:
    """Parameters of SG-Former-S; norms, MLPs, merging, position embedding, stem and head counted by hand."""
    first = DIMS[0]
    total = convolution(3, first, 3) + 2 * convolution(first, first, 3) + count(nn.LayerNorm(first))
    total += 56 * 56 * first + sum(count(nn.LayerNorm(dim)) for dim in DIMS)
    for stage, (dim, heads, depth, reduction) in enumerate(zip(DIMS, HEADS, DEPTHS, REDUCTIONS, strict=True)):
        for index in range(depth):
            if reduction == 1:
                total += count(EnhancedAttention(dim=dim, heads=heads))
            elif index % 2 == 0:
                total += count(HybridScaleAttention(dim=dim, heads=heads, reduction=reduction))
            else:
                total += count(GuidedAttention(dim=dim, heads=heads, rates=RATES[reduction]))
            hidden = dim * mlp_ratio
            mlp = (
                nn.Linear(dim, hidden),
                nn.Conv2d(hidden, hidden, 3, groups=hidden),
                nn.Linear(hidden, dim),
            )
            total += count(*mlp, nn.LayerNorm(dim), nn.LayerNorm(dim))
        if stage:
            total += (
                convolution(DIMS[stage - 1], dim, 1)
                + convolution(dim, dim, 3, dim)
                + convolution(dim, dim, 1)
            )
    return total + count(nn.Linear(DIMS[-1], classes))


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    for side, reduction in ((56, 8), (28, 4), (14, 2)):
        n = side * side
        merged = GuidedAttention(dim=8, heads=2, rates=RATES[reduction]).merge.length(n)
        hybrid = HybridScaleAttention(dim=8, heads=2, reduction=reduction)
        window = hybrid.windows(Grid(side, side)).dense()[0].sum().item()
        pairs = n * merged + n * (n // reduction**2 + window) / 2
        yield Figure(
            claim=f"keys of a guided layer at {side} x {side}; pairs of a hybrid and a guided layer over full",
            paper="not given",
            ours=f"{merged} keys; {pairs / (2 * n * n):.1%}",
            how=f"reduction {reduction}, merging rates {RATES[reduction]}, windows of 7 x 7",
        )
    yield Figure(
        claim="parameters of SG-Former-S",
        paper="22.5 M",
        ours=f"{parameters() / 1e6:.1f} M",
        how="2, 4, 16, 1 layers of 64, 128, 256, 512 channels, 224 x 224 pixels, 1000 classes",
    )
