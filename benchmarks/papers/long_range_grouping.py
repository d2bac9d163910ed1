"""Long-range grouping: what divide and conquer saves."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.routed.long_range_grouping import LongRangeGrouping


def figures() -> Iterator[Figure]:
    """Groups, pairs and parameters of a layer at the published sizes."""
    module = LongRangeGrouping(dim=768, heads=12, group=7)
    for views in (8, 20):
        grid = Grid(views, 14, 14)
        shape = (1, 12, grid.numel, 64)
        found = explain(shape, shape, shape, where=module.where(grid))
        yield Figure(
            claim=f"pairs of grouped attention, of joint attention over {views} views",
            paper="1 / 49 (49 groups)",
            ours=f"1 / {found.pairs_dense / found.pairs_needed:.0f}",
            how=f"{views} x 14 x 14 tokens, 12 heads of 64; "
            f"{found.pairs_computed:,} pairs computed of {found.pairs_dense:,}",
        )
    mask = module.where(Grid(8, 14, 14)).dense()
    yield Figure(
        claim="tokens of a group, from how many views",
        paper="4 V tokens from all V views",
        ours=f"{int(mask[0].sum())} tokens from {len(torch.unique(mask[0].nonzero() // 196))} views",
        how="V = 8, stride 7 on 14 x 14",
    )
    extra = sum(p.numel() for p in module.signature.parameters()) if module.signature else 0
    share = extra / sum(p.numel() for p in module.parameters())
    yield Figure(
        claim="parameters of the inter-view signature",
        paper="a depthwise 3 x 3 convolution (no number given)",
        ours=f"{extra:,}, {share:.2%} of the layer",
        how="768 channels",
    )
