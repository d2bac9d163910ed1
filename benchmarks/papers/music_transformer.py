"""Music Transformer (arXiv 1809.04281): memory of the relative term, counted on tensors without storage."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.mechanisms.scored.music_transformer import RelativeGlobalAttention

LENGTH, DIM, HEADS = 2048, 512, 8


def spread(n: int) -> int:
    """Bytes of the embeddings gathered for every pair of a layer's heads, as relative attention did before."""
    table = torch.empty(HEADS, n, DIM // HEADS, device="meta")
    distance = torch.empty(n, n, dtype=torch.long, device="meta")
    gathered = table[:, distance]
    return gathered.numel() * gathered.element_size()


def skewed(n: int) -> int:
    """Bytes of the embeddings that the skewed form reads."""
    layer = RelativeGlobalAttention(dim=DIM, heads=HEADS, max_distance=n).to("meta")
    return layer.table.numel() * layer.table.element_size()


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    setting = (
        f"L = {LENGTH}, D = {DIM} ({HEADS} heads), float32, one layer and sample; bytes of tensors, counted"
    )
    yield Figure(
        claim="memory of the relative embeddings, gathered for pairs",
        paper="8.5 GB",
        ours=f"{spread(LENGTH) / 1e9:.2f} GB",
        how=setting,
    )
    yield Figure(
        claim="memory of the relative embeddings, skewed",
        paper="4.2 MB",
        ours=f"{skewed(LENGTH) / 1e6:.2f} MB",
        how=setting,
    )
    layer = RelativeGlobalAttention(dim=DIM, heads=HEADS, max_distance=LENGTH // 2)
    rest = sum(p.numel() for p in layer.parameters()) - layer.table.numel()
    shared = RelativeGlobalAttention(dim=DIM, heads=HEADS, max_distance=LENGTH // 2, share=True)
    yield Figure(
        claim="parameters of the table over those of the projections: per head, shared by heads",
        paper="not given",
        ours=f"{layer.table.numel() / rest:.1%}, {shared.table.numel() / rest:.1%}",
        how=f"D = {DIM}, {HEADS} heads, {LENGTH // 2} distances (half of the length, as in the authors' setting)",
    )
