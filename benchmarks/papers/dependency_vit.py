"""DependencyViT (arXiv 2304.03282): what reversing attention adds to a ViT, and what pruning leaves saves."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.kernels.select import watch_plans
from foveate.mechanisms.scored.dependency_vit import DependencyTrunk

TOKENS, DEPTH, HEADS, LITE = 196, 12, 12, 0.16


def figures() -> Iterator[Figure]:
    """Yield sizes of the models beside plain ViTs, the cost of the Lite form, and the passes of one layer."""
    how = f"{DEPTH} blocks, {HEADS} heads, 16 x 16 patches of 224 x 224, 1000 classes; our blocks, rest by formula"
    for name, dim in (("T", 192), ("S", 384)):
        full, lite = (trunk(dim, share) for share in (0.0, LITE))
        ours, plain = parameters(full, dim), vit(dim)
        yield Figure(
            claim=f"DependencyViT-{name}: parameters",
            paper="figure not at hand",
            ours=f"{ours / 1e6:.2f}M, a plain ViT of this width {plain / 1e6:.2f}M",
            how=how,
        )
        dense, pruned = products(full), products(lite)
        yield Figure(
            claim=f"DependencyViT-Lite-{name}: multiply-adds over those of the whole model",
            paper="figure not at hand; leaves are pruned 4 times",
            ours=f"{pruned / 1e9:.2f}G of {dense / 1e9:.2f}G, {pruned / dense:.0%}; "
            f"{lite.kept(TOKENS)[-1]} of {TOKENS} tokens left",
            how=f"a share of {LITE} of all tokens dropped after blocks 2, 5, 8 and 11",
        )
    yield passes()


def trunk(dim: int, share: float) -> DependencyTrunk:
    """Return the trunk of a model, without numbers."""
    with torch.device("meta"):
        return DependencyTrunk(dim=dim, heads=HEADS, depth=DEPTH, prune=share)


def parameters(model: DependencyTrunk, dim: int) -> int:
    """Return those of the trunk, patch embedding, positions and head."""
    return sum(p.numel() for p in model.parameters()) + 769 * dim + TOKENS * dim + 1000 * (dim + 1)


def vit(dim: int) -> int:
    """Return those of a plain ViT without a class token."""
    block = 4 * dim * (dim + 1) + 8 * dim * dim + 5 * dim + 4 * dim
    return DEPTH * block + 2 * dim + 769 * dim + TOKENS * dim + 1000 * (dim + 1)


def products(model: DependencyTrunk) -> int:
    """Return the multiply-adds of the trunk: maps of every token, and q k^T and A^T v once per block."""
    total = 0
    for block, n in zip(model.blocks, model.kept(TOKENS)[:-1], strict=True):
        maps = [part.weight for part in block.modules() if isinstance(part, nn.Linear)]
        total += n * sum(w.numel() for w in maps) + 2 * n * n * maps[0].shape[1]
    return total


def passes() -> Figure:
    """Return what one layer computes here against what it would store with weights written out."""
    torch.manual_seed(0)
    model = DependencyTrunk(dim=192, heads=HEADS, depth=1)
    grid = Grid(14, 14)
    with watch_plans() as plans, torch.no_grad():
        model(torch.randn(1, grid.numel, 192))
    pairs = sum(p.pairs_computed for p in plans)
    return Figure(
        claim="one layer: pairs visited, numbers of the N x N weights kept",
        paper="transposed weights, all of them kept",
        ours=f"{pairs:,} pairs in {len(plans)} passes (row sums, then messages), none kept instead of "
        f"{HEADS * TOKENS * TOKENS:,}",
        how=f"{TOKENS} tokens, {HEADS} heads",
    )
