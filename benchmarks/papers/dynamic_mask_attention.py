"""Dynamic mask attention (arXiv 2508.02124): how many pairs of dense causal attention are left."""

import math
from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.mechanisms.routed.dynamic_mask_attention import select_kept

LENGTHS = (4096, 8192, 16384)
WINDOW = 2048


def figures() -> Iterator[Figure]:
    """Yield the share of causal pairs that a window of 2048 keeps and our cells compute, and their growth."""
    needed, computed = [], []
    for n in LENGTHS:
        bias = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(0))
        schedule = select_kept(bias, n, window=WINDOW)[0].schedule
        needed.append(schedule.pairs_needed)
        computed.append(schedule.pairs_computed)
        causal = n * (n + 1) // 2
        yield Figure(
            claim=f"{n} tokens: share of causal pairs that are kept, and that are computed",
            paper="not given",
            ours=f"{needed[-1] / causal:.3f}, {computed[-1] / causal:.3f}",
            how=f"w = {WINDOW}, random biases; cells of up to 128 queries share their keys",
        )
    grown = math.log2((computed[2] - computed[1]) / (computed[1] - computed[0]))
    yield Figure(
        claim="exponent with which pairs grow in the number of tokens",
        paper="1, from O(N w d)",
        ours=f"{grown:.2f}",
        how="log2 of how pairs computed grow from 8192 to 16384 tokens, against from 4096 to 8192",
    )
