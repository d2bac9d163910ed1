"""STViT: how much cheaper the first stages' attention is, and how much of the map a super token stands for."""

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.routed.super_token_attention import SuperTokenAttention, SuperTokenLayer
from foveate.patterns.coarse import Around, Within

DIMS, HEADS, DEPTHS = (64, 128, 320, 512), (1, 2, 5, 8), (3, 5, 9, 3)
CELLS, SIDES = (8, 4, 1, 1), (56, 28, 14, 7)


def attention_flops(dim: int, heads: int, side: int, cell: int) -> int:
    """FLOPs of one super token attention without its projections."""
    n, m = side * side, (side // cell) ** 2
    inner = explain(*[(1, heads, m, dim // heads)] * 3).flops
    if cell == 1:
        return inner
    grid = Grid(side, side)
    look = explain((1, 1, n, dim), (1, 1, m, dim), (1, 1, m, dim), where=Around(grid, cell, 1, "zero"))
    back = explain((1, 1, m, dim), (1, 1, n, dim), (1, 1, n, dim + 1), where=Within(grid, cell, 1))
    pair = 2 * 2 * dim
    # Needed pairs, as the paper counts: one pass of logits, one of sums and one of reading back.
    return inner + look.pairs_needed * pair + back.pairs_needed * pair // 2


def parameters(classes: int = 1000) -> int:
    """Parameters of the layers of STViT-S, with its stem, its merging and its head counted by hand."""
    total = 0
    for dim, heads, depth, cell in zip(DIMS, HEADS, DEPTHS, CELLS, strict=True):
        layer = SuperTokenLayer(dim=dim, heads=heads, cell=cell)
        total += depth * sum(p.numel() for p in layer.parameters())
    half = DIMS[0] // 2
    plan = [
        (3, half),
        (half, half),
        (half, half * 2),
        (half * 2, DIMS[0]),
        *pairwise(DIMS),
    ]
    for before, after in plan:  # 3x3 convolutions, each with a batch norm
        total += sum(
            p.numel() for m in (nn.Conv2d(before, after, 3), nn.BatchNorm2d(after)) for p in m.parameters()
        )
    head = (nn.Conv2d(DIMS[-1], 1024, 1), nn.BatchNorm2d(1024), nn.Linear(1024, classes))
    return total + sum(p.numel() for m in head for p in m.parameters())


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    full = explain(*[(1, HEADS[0], SIDES[0] ** 2, DIMS[0] // HEADS[0])] * 3).flops
    ours = attention_flops(DIMS[0], HEADS[0], SIDES[0], CELLS[0])
    yield Figure(
        claim="FLOPs of the first stage's attention over full attention",
        paper="not given",
        ours=f"{ours / full:.2%}",
        how="56 x 56 tokens, cells of 8 x 8 (49 super tokens), 64 channels; without projections",
    )
    yield Figure(
        claim="parameters of STViT-S",
        paper="25 M",
        ours=f"{parameters() / 1e6:.1f} M",
        how="3, 5, 9, 3 layers of 64, 128, 320, 512 channels, convolutional stem and merging, 1000 classes",
    )
    module = SuperTokenAttention.for_workload(dim=DIMS[0], grid=Grid(56, 56), heads=1)
    yield Figure(
        claim="tokens per super token in the first stage",
        paper="64",
        ours=str(module.cell[0] * module.cell[1]) if isinstance(module.cell, tuple) else str(module.cell**2),
        how="what `for_workload` chooses for 56 x 56 tokens",
    )
