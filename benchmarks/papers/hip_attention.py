"""HiP attention (arXiv 2406.09827): products of search and attention against dense attention, and their growth."""

import math
from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.mechanisms.routed.hip_attention import hip_selection
from foveate.routing.tree import search_products

LENGTHS = (8192, 16384, 32768)
# The authors' defaults.
KEYS, BLOCK_Q, BLOCK_K, GROUP, WINDOW, SINK = 512, 32, 1, 8, 128, 32


def figures() -> Iterator[Figure]:
    """Yield the products per length, the exponent with which they grow, and how much attention the search finds."""
    how = f"k = {KEYS}, query blocks of {BLOCK_Q}, units of {GROUP} keys, window {WINDOW}, {SINK} sinks"
    totals = []
    for n in LENGTHS:
        search = search_products(
            n, keep=KEYS // GROUP, block_q=BLOCK_Q, block_k=BLOCK_K, group=GROUP, window=WINDOW
        )
        totals.append(search + n * (KEYS + WINDOW + SINK))
        yield Figure(
            claim=f"{n} tokens: products of search and of attention, as shares of causal attention",
            paper="not given",
            ours=f"{search / (n * n / 2):.3f}, {n * (KEYS + WINDOW + SINK) / (n * n / 2):.3f}",
            how=how,
        )
    yield Figure(
        claim="growth of all products from 16384 to 32768 tokens; T log T would be "
        f"{2 * math.log2(32768) / math.log2(16384):.2f}, T^2 is 4",
        paper="O(T log T)",
        ours=f"{totals[2] / totals[1]:.2f}",
        how=how,
    )
    found, window = recall()
    yield Figure(
        claim="attention mass on the keys seen, with the search and with window and sinks alone",
        paper="not given",
        ours=f"{found:.2f}, {window:.2f}",
        how="4096 tokens whose keys and queries drift slowly (as neighbours in text do), one head of 64 channels, "
        "keys 256, window 128",
    )


def recall() -> tuple[float, float]:
    """Return the mass of dense attention's weights that the search keeps, and that window and sinks have."""
    generator = torch.Generator().manual_seed(0)
    n, d, span = 4096, 64, 32
    noise = torch.randn(1, 1, n // span + 2, d, generator=generator)
    smooth = torch.nn.functional.interpolate(
        noise[0].transpose(1, 2), size=n, mode="linear", align_corners=True
    ).transpose(1, 2)[None]
    q = smooth.roll(n // 2, dims=2) * 4 + torch.randn(1, 1, n, d, generator=generator)
    k = smooth + 0.3 * torch.randn(1, 1, n, d, generator=generator)
    logits = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(
        ~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf
    )
    weights = logits.softmax(-1)
    found = hip_selection(q, k, keys=256, block_q=BLOCK_Q, block_k=1, group=8, window=WINDOW, sink=SINK)
    kept = found[1].dense()
    alone = torch.ones(n, n, dtype=torch.bool).tril() & ~torch.ones(n, n, dtype=torch.bool).tril(-WINDOW)
    alone[:, :SINK] = True
    rows = slice(n // 2, None)
    return float((weights * kept)[:, :, rows].sum(-1).mean()), float(
        (weights * alone)[:, :, rows].sum(-1).mean()
    )
