"""Lightning attention (arXiv 2405.17381): what a token costs at every length, and what decoding keeps."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.linear import explain_linear
from foveate.cost.render import amount
from foveate.measure.timer import time_interleaved
from foveate.mechanisms.linear.lightning_attention import LightningAttention

DIM, HEADS = 1024, 8
SHORT, LONG = 1024, 131072


def figures() -> Iterator[Figure]:
    """Yield operations per token, measured speed, the state beside keys and values, and the crossover."""
    cost = {
        n: explain_linear("lightning_attention", dim=DIM, grid=Grid(n), heads=HEADS) for n in (SHORT, LONG)
    }
    ratio = cost[LONG].flops_per_token / cost[SHORT].flops_per_token
    dense = cost[LONG].dense_flops(LONG) / LONG / (cost[SHORT].dense_flops(SHORT) / SHORT)
    layer = f"one layer of {DIM} channels and {HEADS} heads"
    yield Figure(
        claim=f"FLOPs per token of a forward pass at {LONG} tokens, over those at {SHORT}",
        paper="1 (constant training speed from 1K to 128K tokens)",
        ours=f"{ratio:.2f}; full attention {dense:.1f}",
        how=f"{layer}, counted; full attention with causal pairs only and its projections",
    )
    short, long = 1024, 16384
    yield Figure(
        claim=f"tokens per second, forward and backward, at {long} tokens over those at {short}",
        paper="1 (constant)",
        ours=f"{speed_ratio(short, long):.2f}",
        how="one layer of 64 channels and 2 heads, one sample, CPU, float32, one thread, median of 5",
    )
    yield Figure(
        claim=f"bytes that decoding keeps per layer after {LONG} tokens",
        paper="constant in the length",
        ours=f"{amount(cost[LONG].state_bytes, 'B')}; keys and values {amount(cost[LONG].cache_bytes(LONG), 'B')}",
        how=f"{layer}, float32; the state is the smaller from {cost[LONG].cache_crossover} tokens on",
    )
    yield Figure(
        claim="tokens from which a layer of full attention takes more FLOPs",
        paper="not given",
        ours=f"{cost[SHORT].crossover}; {cost[SHORT].scan_crossover} without projections",
        how=f"{layer}, forward, chunks of {cost[SHORT].calls[0].chunk} tokens",
    )


def speed_ratio(short: int, long: int) -> float:
    """Return how many times as many tokens per second a long sequence makes as a short one."""
    torch.manual_seed(0)
    module = LightningAttention(dim=64, heads=2)
    xs = {n: torch.randn(1, n, 64, requires_grad=True) for n in (short, long)}
    calls = {str(n): (lambda n=n, x=x: module(x, Grid(n)).sum().backward()) for n, x in xs.items()}
    found = time_interleaved(calls, min_repeats=5, max_repeats=5, budget_s=20)
    return (long / found.times[str(long)].median_ms) / (short / found.times[str(short)].median_ms)
