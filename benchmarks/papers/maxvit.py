"""MaxViT: parameters and FLOPs of the published sizes, from the blocks."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.papers import Figure
from foveate.mechanisms.local.maxvit import MaxViTBlock

# Stem width, blocks per stage, width of the first stage (it doubles), and published parameters and FLOPs at 224.
SIZES = {
    "T": (64, (2, 2, 5, 2), 64, "31M", "5.6G"),
    "S": (64, (2, 2, 5, 2), 96, "69M", "11.7G"),
    "B": (64, (2, 6, 14, 2), 96, "119M", "24.2G"),
    "L": (128, (2, 6, 14, 2), 128, "212M", "43.9G"),
}


def network(stem: int, depths: tuple[int, ...], dim: int) -> nn.Sequential:
    """Stem, stages and head for 224 x 224 images and 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, stem, 3, stride=2, padding=1),
        nn.BatchNorm2d(stem, eps=1e-3),
        nn.GELU(approximate="tanh"),
        nn.Conv2d(stem, stem, 3, padding=1),
    ]
    width = stem
    for stage, depth in enumerate(depths):
        for index in range(depth):
            out = dim * 2**stage
            block = MaxViTBlock(dim=width, dim_out=out, heads=out // 32, stride=1 if index else 2)
            layers.append(block)
            width = out
    head = [nn.LayerNorm(width, eps=1e-5), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1000)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    for name, (stem, depths, dim, parameters, flops) in SIZES.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in network(stem, depths, dim).parameters())
        yield Figure(
            claim=f"parameters of MaxViT-{name}",
            paper=parameters,
            ours=f"{count:,}",
            how="stem, blocks and head put together from the blocks here, 1000 classes",
        )
        if name == "T":
            model = network(stem, depths, dim).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, 224, 224))
            yield Figure(
                claim=f"multiply-adds of MaxViT-{name} at 224 x 224",
                paper=flops,
                ours=f"{counter.get_total_flops() / 2e9:.2f}G",
                how="counted while one image runs: convolutions, projections and attention",
            )
