"""VOLO (arXiv 2106.13112): cost of outlook attention beside window attention, and the sizes of the models."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.local.volo import OutlookAttention, Outlooker

# layers per stage, channels of outlookers and transformers, their heads, width of the MLPs and of the stem
MODELS = {
    "VOLO-D1": ((4, 14), (192, 384), (6, 12), 3, 64, "27M (26,632,040 in the authors' code)"),
    "VOLO-D2": ((6, 18), (256, 512), (8, 16), 3, 64, "59M (58,678,336)"),
    "VOLO-D3": ((8, 28), (256, 512), (8, 16), 3, 64, "86M (86,325,072)"),
    "VOLO-D4": ((8, 28), (384, 768), (12, 16), 3, 64, "193M (192,961,520)"),
    "VOLO-D5": ((12, 36), (384, 768), (12, 16), 4, 128, "296M (295,455,584)"),
}


def figures() -> Iterator[Figure]:
    """Yield the formula of the cost against what a layer multiplies, and the parameters of the models."""
    dim, heads, window, side = 192, 6, 3, 28
    n, box = side * side, window * window
    module = OutlookAttention(dim=dim, heads=heads, window=window)
    pairs = module.where(Grid(side, side)).schedule().pairs_computed
    linear = n * (module.v.weight.numel() + module.proj.weight.numel() + module.weights.weight.numel())
    formula = n * dim * (2 * dim + heads * box * box)
    yield Figure(
        claim="multiply-adds of outlook attention: HW C (2C + H K^4)",
        paper=f"{formula / 1e6:.0f}M by the formula, which leaves out the mixing of the values",
        ours=f"{linear / 1e6:.0f}M in the projections, {(linear + pairs * dim) / 1e6:.0f}M with the mixing",
        how=f"{side} x {side} tokens, {dim} channels, {heads} heads, K = {window}, stride 1",
    )
    local = n * dim * (4 * dim + 2 * box)
    yield Figure(
        claim="the same for window attention of K x K keys: HW C (4C + 2 K^2)",
        paper=f"{local / 1e6:.0f}M by the formula",
        ours=f"outlook attention takes {formula / local:.2f} of it",
        how="same layer; the published models place anchors 2 apart, a fourth of the written weights",
    )
    for name, (layers, dims, counts, ratio, stem, printed) in MODELS.items():
        yield Figure(
            claim=f"{name}: parameters",
            paper=printed,
            ours=f"{parameters(layers, dims, counts, ratio, stem):,}",
            how="our outlookers; the rest counted layer by layer; 224 x 224, 1000 classes",
        )


def parameters(
    layers: tuple[int, int], dims: tuple[int, int], heads: tuple[int, int], ratio: int, stem: int
) -> int:
    """Return the parameters of a VOLO with `layers` outlookers and transformer blocks."""
    low, high = dims
    with torch.device("meta"):
        block = (
            nn.LayerNorm(high),
            nn.Linear(high, 3 * high, bias=False),
            nn.Linear(high, high),
            nn.LayerNorm(high),
            nn.Linear(high, ratio * high),
            nn.Linear(ratio * high, high),
        )
        once = (
            nn.Conv2d(3, stem, 7, bias=False),
            *(nn.Conv2d(stem, stem, 3, bias=False) for _ in range(2)),
            *(nn.BatchNorm2d(stem) for _ in range(3)),
            nn.Conv2d(stem, low, 4),
            nn.Conv2d(low, high, 2),
            nn.LayerNorm(high),
            *(nn.Linear(high, 1000) for _ in range(2)),
        )
        outlooker = Outlooker(dim=low, heads=heads[0], mlp_ratio=ratio)
    positions, class_token = 14 * 14 * high, high
    # Two blocks of class attention weigh as much as any other block.
    parts = [(1, *once), (layers[0], outlooker), (layers[1] + 2, *block)]
    count = sum(times * sum(p.numel() for m in modules for p in m.parameters()) for times, *modules in parts)
    return count + positions + class_token
