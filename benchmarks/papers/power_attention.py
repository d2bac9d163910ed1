"""PowerAttention: how sparse the mask is, and how far it reaches against masks that cost as much."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.patterns.lower import lower
from foveate.patterns.power import PowerBlocks


def reached(blocks: torch.Tensor, layers: int) -> int:
    """How many blocks the last one hears of through `layers` layers of a block mask."""
    seen = torch.zeros(len(blocks), dtype=torch.bool)
    seen[-1] = True
    for _ in range(layers):
        seen = blocks[seen].any(0)
    return int(seen.sum())


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    n, block = 32768, 256
    where = PowerBlocks(block, window=5, sinks=1)
    schedule = lower(where, n)
    count = n // block
    most = max(len(where.key_blocks(b)) for b in range(count))
    yield Figure(
        claim="blocks of keys a query sees at 32K",
        paper="about 10",
        ours=f"{most} at most",
        how="blocks of 256, a window of 5 blocks, 1 sink block",
    )
    yield Figure(
        claim="sparsity at 32K",
        paper="0.94",
        ours=f"{1 - schedule.pairs_needed / n**2:.3f} of all pairs are left out",
        how="the same mask; causal attention alone leaves out 0.5",
    )
    power = PowerBlocks(1, window=5, sinks=1).dense(count)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    window = (distance >= 0) & ((distance < 9) | (torch.arange(count) < 1))
    for layers in (1, 2, 3):
        yield Figure(
            claim=f"blocks of 128 that the last one hears of through {layers} layer{'s' * (layers > 1)}, "
            "against a sliding window of 9 blocks and a sink",
            paper="grows as 2^layers against in proportion",
            ours=f"{reached(power, layers)} against {reached(window, layers)}",
            how="counted on the block masks at 32K",
        )
    longest = 131072
    yield Figure(
        claim="upper bound of the speed-up over causal attention at 128K",
        paper="21.6x (kernel, measured on an A800)",
        ours=f"{longest**2 / 2 / lower(where, longest).pairs_computed:.1f}x in pairs",
        how="pairs computed in cells of whole blocks",
    )
