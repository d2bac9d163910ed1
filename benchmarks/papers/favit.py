"""FaViT (arXiv 2312.08614): sizes of the published models, and keys a query meets."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.mechanisms.local.favit import FactorizedAttention, WindowMean

HEADS, RATIOS, REDUCTIONS = (1, 2, 4, 8), (8, 6, 4, 4), (8, 4, 2, 1)
# channels and depths of the four stages, and what the paper and the authors' code give
MODELS = {
    "FaViT-B0": ((32, 64, 128, 256), (2, 2, 6, 2), "3.4M, 0.6G (3,427,704 in the authors' code)"),
    "FaViT-B1": ((64, 128, 256, 512), (2, 2, 6, 2), "13M, 2.4G (12,958,568)"),
    "FaViT-B2": ((64, 128, 256, 512), (2, 3, 18, 3), "14% fewer than Swin-T's 28.3M, 4.5G (24,919,896)"),
    "FaViT-B3": ((96, 192, 384, 768), (2, 3, 14, 3), "48M, 8.5G (48,746,440)"),
}


def figures() -> Iterator[Figure]:
    """Yield parameters and multiply-adds of the models, and how many keys stand for a map."""
    how = "our attention; the rest counted layer by layer; one image of 224 x 224, 1000 classes"
    for name, (dims, depths, printed) in MODELS.items():
        size, adds = favit(dims, depths)
        yield Figure(
            claim=f"{name}: parameters, multiply-adds",
            paper=printed,
            ours=f"{size:,}, {adds / 1e9:.2f}G",
            how=how,
        )
    module, side = FactorizedAttention(dim=64, heads=1, reduction=8), 56
    pooled, local = (side // module.reduction) ** 2, module.window**2
    yield Figure(
        claim="keys of a query in the first stage, in the global and in each local group",
        paper="N / r^2 and M^2",
        ours=f"{pooled} and {local}, of {side * side} tokens",
        how=f"{side} x {side} tokens, r = {module.reduction}, M = {module.window}",
    )


def favit(dims: tuple[int, ...], depths: tuple[int, ...]) -> tuple[int, int]:
    """Return (parameters, multiply-adds) of a FaViT at 224 x 224."""
    size, adds, side, before = 0, 0, 224, 3

    def add(positions: int, layer: nn.Module) -> None:
        nonlocal size, adds
        size += sum(p.numel() for p in layer.parameters())
        adds += positions * sum(p.numel() for p in layer.parameters() if p.dim() > 1)

    with torch.device("meta"):
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side //= 2 if stage else 4
            n, hidden, r = side * side, dim * RATIOS[stage], REDUCTIONS[stage]
            add(n, nn.Conv2d(before, dim, 3 if stage else 7))
            add(0, nn.LayerNorm(dim))
            for _ in range(depth):
                attention = FactorizedAttention(dim=dim, heads=HEADS[stage], reduction=r)
                add(0, attention)
                adds += attention_adds(attention, n)
                for positions, layer in (
                    (0, nn.LayerNorm(dim)),
                    (0, nn.LayerNorm(dim)),
                    (n, nn.Linear(dim, hidden)),
                    (n, nn.Conv2d(hidden, hidden, 3, groups=hidden)),
                    (n, nn.Linear(hidden, dim)),
                ):
                    add(positions, layer)
            add(0, nn.LayerNorm(dim))
            before = dim
        add(1, nn.Linear(before, 1000))
    return size, adds


def attention_adds(module: FactorizedAttention, n: int) -> int:
    """Return the multiply-adds of one layer on `n` tokens: maps and convolutions, then pairs."""
    pooled, box = n // module.reduction**2, module.window**2

    def weights(*layers: nn.Module) -> int:
        return sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)

    total = n * weights(module.q, module.mix, module.proj)
    total += pooled * weights(module.reduce, module.kv, module.local)
    total += 2 * n * pooled * module.parts[0]
    for group, part in zip(module.groups, module.parts[1:], strict=True):
        assert isinstance(group, WindowMean)
        total += box * (module.heads * weights(group.fc, group.kv) + weights(group.local))
        total += 2 * n * box * part
    return total
