"""Selective self-attention (arXiv 2411.12892): new parameters, and the dilution they work against."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.mechanisms.scored.selective_self_attention import SelectiveSelfAttention

# Channels, heads, layers, and parameters of the whole model in millions.
MODELS = {"GPT-2": (768, 12, 12, 124), "Pythia-410M": (1024, 16, 24, 405), "Llama-7B": (4096, 32, 32, 6738)}


def overhead(dim: int, heads: int, layers: int) -> int:
    """Return the parameters SSA adds to a model."""
    with torch.device("meta"):
        ours = SelectiveSelfAttention(dim=dim, heads=heads)
        plain = SelectiveSelfAttention(dim=dim, heads=heads, tokens=(), position="none")
    count = [sum(p.numel() for p in module.parameters()) for module in (ours, plain)]
    return layers * (count[0] - count[1])


def largest(n: int, rate: float) -> float:
    """Return the largest weight of a row of n standard normal scores times 1 + rate log n, mean of 256 rows."""
    scores = torch.randn(256, n, generator=torch.Generator().manual_seed(0))
    return (scores * (1 + rate * torch.log(torch.tensor(float(n))))).softmax(-1).amax(-1).mean().item()


def figures() -> Iterator[Figure]:
    """Yield the share of new parameters, and the largest weight of long rows."""
    for name, (dim, heads, layers, millions) in MODELS.items():
        new = overhead(dim, heads, layers)
        yield Figure(
            claim=f"new parameters of {name}",
            paper="less than 0.5 %",
            ours=f"{new}, {new / (1e6 * millions):.4%}",
            how=f"{layers} layers, {dim} channels, {heads} heads; token temperatures of queries and values, "
            f"position temperature; {millions} M parameters without",
        )
    short, long = 256, 16384
    for what, rate in (("plain attention", 0.0), ("a position temperature, a = 0.5", 0.5)):
        yield Figure(
            claim=f"largest weight of a row of {short} and of {long} keys, {what}",
            paper="plain attention dilutes, selective attention does not",
            ours=f"{largest(short, rate):.3f}, {largest(long, rate):.3f}",
            how="independent standard normal scores, mean of 256 rows",
        )
