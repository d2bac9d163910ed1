"""CATANet: parameters of its layers, and the pairs that sorted groups and centres need."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.routed.catanet import PatchBlock, TokenAggregationBlock
from foveate.patterns.overlap import overlapping
from foveate.routing.sorted_groups import sorted_groups

DIM, HEADS, QK, MLP, BLOCKS, UPSCALE = 40, 4, 36, 96, 8, 4
PATCHES, CENTRES, GROUPS = (16, 20, 24, 28) * 2, (16, 32, 64, 128) * 2, (256, 128, 64, 32) * 2


def count(*modules: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def parameters() -> int:
    """Parameters of CATANet for x4, its convolutions counted by hand."""
    total = count(nn.Conv2d(3, DIM, 3))
    for patch, centres, group in zip(PATCHES, CENTRES, GROUPS, strict=True):
        options = {"dim": DIM, "heads": HEADS, "qk_dim": QK, "mlp_dim": MLP}
        aggregation = TokenAggregationBlock(clusters=centres, group=group, **options)
        total += count(aggregation, PatchBlock(patch=patch, **options), nn.Conv2d(DIM, DIM, 3))
    stages = [nn.Conv2d(DIM, 4 * DIM, 3) for _ in range(UPSCALE // 2)]
    return total + count(*stages, nn.Conv2d(DIM, 3, 3))


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    yield Figure(
        claim="parameters of CATANet for x4",
        paper="535 K",
        ours=f"{parameters() / 1e3:.0f} K",
        how="8 blocks of 40 channels with their 3x3 convolutions, two pixel-shuffle stages",
    )
    grid = Grid(64, 64)
    n, needed = grid.numel, 0
    order = torch.arange(n)[None]
    for patch, centres, group in zip(PATCHES, CENTRES, GROUPS, strict=True):
        needed += sorted_groups(order, group).schedule.pairs_needed + n * centres
        needed += overlapping(grid, patch, patch - 2).pairs_needed
    yield Figure(
        claim="pairs of a network over those of full attention in the same places",
        paper="not given",
        ours=f"{needed / (2 * BLOCKS * n * n):.1%}",
        how="64 x 64 tokens (the training patch), groups, centres and overlapping patches as published",
    )
