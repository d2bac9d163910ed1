"""URPE (arXiv 2205.13401): parameters of the factors, and the synthetic task that needs them."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.scored.urpe import UniversalPosition, UniversalRelativeAttention
from foveate.scores.buckets import ClippedOffsets

TOKENS, DIM, HEADS, STEPS = 32, 32, 8, 300


def identified(factors: bool) -> float:
    """Train one layer to say where each of many equal tokens stands; returns its accuracy."""
    torch.manual_seed(0)
    every = ClippedOffsets(TOKENS - 1)
    token = nn.Parameter(torch.randn(DIM))
    mix = UniversalRelativeAttention(dim=DIM, heads=HEADS, tables=False)
    position = UniversalPosition(HEADS, every, every if factors else None)
    head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, TOKENS))
    parts = nn.ModuleList([mix, position, head])
    optimizer = torch.optim.Adam([token, *parts.parameters()], lr=5e-3)
    labels = torch.arange(TOKENS)

    def logits() -> torch.Tensor:
        x = token.expand(1, TOKENS, -1)
        return head(x + mix(x, Grid(TOKENS), position=position()))[0]

    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(), labels).backward()
        optimizer.step()
    return float((logits().argmax(-1) == labels).float().mean())


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    setting = f"{TOKENS} equal tokens, one layer, D = {DIM}, {HEADS} heads, every offset has its entry, {STEPS} steps"
    for factors, paper in ((True, "about 100%"), (False, "fails")):
        yield Figure(
            claim=f"position identification, {'with' if factors else 'without'} factors after the softmax",
            paper=paper,
            ours=f"{identified(factors):.1%}",
            how=setting,
        )
    heads, length, dim = 12, 512, 768
    factor = UniversalPosition(heads, None, ClippedOffsets(length - 1)).factor
    assert factor is not None
    layer = UniversalRelativeAttention(dim=dim, heads=heads, tables=False)
    plain = sum(p.numel() for p in layer.parameters())
    yield Figure(
        claim="parameters of the factors, for a whole model",
        paper="heads (2 T - 1)",
        ours=f"{factor.numel():,} ({factor.numel() / plain:.2%} of the projections of one layer)",
        how=f"T = {length} tokens, {heads} heads, D = {dim}, every offset has its entry",
    )
