"""Mixture of heads (arXiv 2410.11842): the share of attention that is computed, and what the router adds."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.kernels.select import watch_plans
from foveate.mechanisms.scored.mixture_of_heads import MixtureOfHeads

DIM, HEADS, SHARED, N = 320, 20, 5, 256


def share(shared: int, routed: int) -> tuple[float, float]:
    """Return the pairs of a layer over those of all heads: what tokens chose, and what the busiest head makes of it."""
    torch.manual_seed(0)
    module = MixtureOfHeads(dim=DIM, heads=HEADS, shared=shared, routed=routed, backend="tiles").eval()
    with watch_plans() as plans, torch.no_grad():
        module(torch.randn(1, N, DIM), Grid(N))
    every = HEADS * N * N
    return tuple(sum(getattr(p, name) for p in plans) / every for name in ("pairs_needed", "pairs_computed"))


def figures() -> Iterator[Figure]:
    """Yield the shares at the paper's activations, and the router's parameters."""
    for active in (0.5, 0.75, 0.9):
        taken = round(active * HEADS)
        needed, padded = share(SHARED, taken - SHARED)
        yield Figure(
            claim=f"query-key pairs of a layer with {taken} of {HEADS} heads per token, over all heads",
            paper=f"{active:.0%} of the heads",
            ours=f"{needed:.1%}; {padded:.1%} in cells as large as the busiest head",
            how=f"{SHARED} shared heads, {N} random tokens, an untrained router; the CPU core drops the padding",
        )
    module = MixtureOfHeads(dim=DIM, heads=HEADS, shared=SHARED, routed=10)
    router = sum(p.numel() for p in module.router.parameters())
    rest = sum(p.numel() for p in module.parameters()) - router
    yield Figure(
        claim="parameters of the router over those of the attention layer",
        paper='"without ... increasing the number of parameters"',
        ours=f"{router / rest:.2%}",
        how=f"{DIM} channels, {HEADS} heads, {SHARED} of them shared",
    )
