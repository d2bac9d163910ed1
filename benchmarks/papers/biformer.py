"""BiFormer (arXiv 2303.08810): how few pairs routing leaves, their growth, and what they hold on real maps."""

import math
from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from benchmarks.papers._maps import HOW, captured, line
from foveate.core.grid import Grid
from foveate.routing.regions import Regions, select_regions


def pairs(grid: Grid, regions: int, topk: int) -> int:
    """Count the pairs of tokens that routing computes, and those of regions that it scores."""
    cut = Regions.of_count(grid, regions)
    chosen = torch.arange(topk).expand(1, cut.numel, topk)
    return select_regions(cut, chosen).schedule.pairs_computed + cut.numel**2


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    grid = Grid(56, 56)
    yield Figure(
        claim="pairs of routed attention, regions included, over those of dense attention",
        paper="k / S^2 of the tokens are attended to",
        ours=f"{pairs(grid, 7, 4) / grid.numel**2:.2%}; k / S^2 is {4 / 49:.2%}",
        how="56 x 56 tokens, S = 7, k = 4",
    )
    # The number of regions that suits a map grows as the 2/3 power of its tokens.
    small, large = Grid(8, 8), Grid(64, 64)
    growth = math.log(pairs(large, 16, 4) / pairs(small, 4, 4)) / math.log(large.numel / small.numel)
    yield Figure(
        claim="p in pairs ~ (HW)^p with the number of regions that suits the map",
        paper="4/3",
        ours=f"{growth:.3f}",
        how="8 x 8 tokens in 4 x 4 regions and 64 x 64 tokens in 16 x 16, k = 4, counted",
    )
    names = ("regions", "window")
    found = captured(names, (4 / 49,))
    if found is not None:
        yield Figure(
            claim="attention mass on routed pairs, and on a window of as many keys",
            paper="not given",
            ours=line(found, names),
            how=f"{HOW}; 64 regions of 8 tokens in a row, routed for every head, where the paper routes maps it trains",
        )
