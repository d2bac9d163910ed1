"""VWA (arXiv 2404.16573): what a context R times as wide costs, rescaled and not."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.varying_window_attention import VaryingWindowBranch

SIDE, WINDOWS, DIM, HEADS = 64, 8, 256, 8


def figures() -> Iterator[Figure]:
    """Yield attention pairs beside plain window attention, and what the embedding adds."""
    grid, n = Grid(SIDE, SIDE), SIDE * SIDE
    shape = (1, HEADS, n, DIM // HEADS)
    how = f"{SIDE} x {SIDE} tokens, {WINDOWS} x {WINDOWS} windows, {DIM} channels, {HEADS} heads"
    plain = HEADS * n * n // WINDOWS**2
    for ratio in (2, 4, 8):
        branch = VaryingWindowBranch(dim=DIM, heads=HEADS, ratio=ratio, windows=WINDOWS)
        ours = explain(shape, shape, shape, where=branch.where(grid)).pairs_needed
        context = branch.contexts(grid)[branch.where(grid).dense()[0]].unique().numel()
        yield Figure(
            claim=f"attention pairs with R = {ratio}, against window attention; tokens a window sees",
            paper=f"1 (R^2 = {ratio**2} without rescaling); {ratio**2} x 64",
            ours=f"{ours / plain:g} ({context * n * HEADS / plain:g}); {context}",
            how=how,
        )
        embed = n * sum(p.numel() for p in branch.embed.parameters() if p.dim() > 1)
        yield Figure(
            claim=f"multiply-adds of the embedding (DOPE) with R = {ratio}: HW C^2 for any R",
            paper=f"{n * DIM**2 / 1e6:.0f}M",
            ours=f"{embed / 1e6:.0f}M",
            how=how,
        )
