"""LITv2 with HiLo attention: size and cost of the published models, and of the sweep over alpha."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.hilo import HiLoAttention

SMALL = {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
MODELS = {
    "LITv2-S": (SMALL, "28M, 3.7G"),
    "LITv2-M": ({**SMALL, "depths": (2, 2, 18, 2)}, "49M, 7.5G"),
    "LITv2-B": ({"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}, "87M, 13.2G"),
}
SWEEP = {0.0: "3.97G", 0.9: "3.73G", 1.0: "3.70G"}


def figures() -> Iterator[Figure]:
    """Yield parameters and multiply-adds of the models, and the latter of LITv2-S for several alpha."""
    how = "our HiLo modules; the rest of LITv2 counted layer by layer; one image of 224 x 224"
    for name, (spec, printed) in MODELS.items():
        size, adds = litv2(**spec, alpha=0.9)
        yield Figure(
            claim=f"{name}: parameters, multiply-adds",
            paper=printed,
            ours=f"{size / 1e6:.1f}M, {adds / 1e9:.2f}G",
            how=how,
        )
    for alpha, printed in SWEEP.items():
        adds = litv2(**SMALL, alpha=alpha)[1]
        yield Figure(
            claim=f"LITv2-S with alpha = {alpha}: multiply-adds",
            paper=printed,
            ours=f"{adds / 1e9:.2f}G",
            how=how,
        )
    side, n = 14, 196
    one = {share: cost(HiLoAttention(dim=384, heads=12, window=2, alpha=share), side) for share in (0.0, 0.9)}
    plain = cost(HiLoAttention(dim=384, heads=12, window=1), side)
    yield Figure(
        claim="multiply-adds of one attention layer: all local, alpha = 0.9, plain attention",
        paper="not given",
        ours=" : ".join(f"{x / 1e6:.0f}M" for x in (one[0.0], one[0.9], plain)),
        how=f"the third stage of LITv2-S: {n} tokens, 384 channels, 12 heads, windows of 2 x 2",
    )


def cost(module: HiLoAttention, side: int) -> int:
    """Return the multiply-adds of one HiLo layer on a square map: projections and pairs."""
    n, window, width = side * side, module.window, module.dim // module.heads
    assert isinstance(window, int)
    keys = (-(-side // window)) ** 2
    total = 0
    if module.high_heads:
        shape = (1, module.high_heads, n, width)
        total += n * (module.high_qkv.weight.numel() + module.high_proj.weight.numel())
        total += explain(shape, shape, shape, where=module.where(Grid(side, side))).pairs_needed * 2 * width
    if module.low_heads:
        queries, means = (1, module.low_heads, n, width), (1, module.low_heads, keys, width)
        total += n * (module.low_q.weight.numel() + module.low_proj.weight.numel())
        total += keys * module.low_kv.weight.numel()
        total += explain(queries, means, means).pairs_needed * 2 * width
    return total


def litv2(*, width: int, depths: tuple[int, ...], heads: tuple[int, ...], alpha: float) -> tuple[int, int]:
    """Return (parameters, multiply-adds) of LITv2 at 224 x 224 with 1000 classes.

    Two stages of convolutional MLPs, two with attention (the last one plain), deformable 2 x 2 merging
    between stages: 12 channels of offsets and modulation, then the convolution. Norms count as parameters
    only.
    """
    size, adds, side = 0, 0, 56

    def add(positions: int, kind: Callable[..., nn.Module], *sizes: int, **options: Any) -> nn.Module:
        nonlocal size, adds
        with torch.device("meta"):
            layer = kind(*sizes, **options)
        size += sum(p.numel() for p in layer.parameters())
        adds += positions * sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        return layer

    add(side * side, nn.Conv2d, 3, width, 4)
    add(0, nn.LayerNorm, width)
    for stage, depth in enumerate(depths):
        dim = width * 2**stage
        for _ in range(depth):
            if stage > 1:
                add(0, nn.LayerNorm, dim)
                window = 2 if stage == 2 else 1
                options = {"heads": heads[stage], "window": window, "alpha": alpha, "qkv_bias": True}
                attention = add(0, HiLoAttention, dim=dim, **options)
                assert isinstance(attention, HiLoAttention)
                adds += cost(attention, side)
            add(0, nn.LayerNorm, dim)
            add(side * side, nn.Linear, dim, 4 * dim)
            add(side * side, nn.Conv2d, 4 * dim, 4 * dim, 3, groups=4 * dim)
            add(side * side, nn.Linear, 4 * dim, dim)
        if stage + 1 < len(depths):
            side //= 2
            add(side * side, nn.Conv2d, dim, 12, 2)
            add(side * side, nn.Conv2d, dim, 2 * dim, 2)
            add(0, nn.BatchNorm2d, 2 * dim)
    final = width * 2 ** (len(depths) - 1)
    add(0, nn.LayerNorm, final)
    add(1, nn.Linear, final, 1000)
    return size, adds
