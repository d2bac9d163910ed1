"""A2Mamba (arXiv 2507.16624): sizes of the published models, from our mixer and layers counted one by one."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.linear.a2mamba import A2Mamba
from foveate.mechanisms.linear.rala import ConvFFN

# channels, depths, heads and widths of the feed-forward parts of four stages; stages whose two residuals have a
# scale and a bias per channel; what is printed
MODELS = {
    "A2Mamba-N": ((32, 64, 128, 192), (2, 2, 8, 2), (2, 2, 4, 8), (4, 4, 3, 3), (), "4M, 0.8G"),
    "A2Mamba-T": ((48, 96, 256, 448), (2, 2, 10, 2), (2, 4, 8, 16), (4, 4, 3, 3), (), "15M, 2.7G"),
    "A2Mamba-S": ((64, 128, 320, 512), (2, 4, 12, 4), (2, 4, 10, 16), (4, 4, 3, 3), (2, 3), "31M, 5.4G"),
    "A2Mamba-B": (
        (96, 192, 384, 512),
        (4, 6, 12, 6),
        (4, 8, 12, 16),
        (4, 4, 3.75, 3.75),
        (0, 1, 2, 3),
        "51M, 10.7G",
    ),
    "A2Mamba-L": (
        (96, 192, 448, 672),
        (4, 6, 18, 6),
        (4, 8, 16, 24),
        (4, 4, 4, 4),
        (0, 1, 2, 3),
        "95M, 17.4G",
    ),
}
WINDOWS = (11, 9, 7, 7)


def figures() -> Iterator[Figure]:
    """Yield parameters and multiply-adds of the models, and what the maps cost on states."""
    for name, (dims, depths, heads, ratios, scaled, printed) in MODELS.items():
        size, adds, again = count(dims, depths, heads, ratios, scaled)
        how = "our mixers; the rest counted layer by layer; one image of 224 x 224, 1000 classes"
        yield Figure(
            claim=f"{name}: parameters, multiply-adds", paper=printed, ours=f"{size / 1e6:.1f}M, {adds / 1e9:.2f}G",
            how=how,
        )  # fmt: skip
        yield Figure(
            claim=f"{name}: share of the multiply-adds that mixes states, without and with making the maps anew",
            paper="not given",
            ours=f"{again / adds:.1%}, {2 * again / (adds + again):.1%}",
            how="pairs of the two neighbourhoods; the authors keep the maps, we compute them again",
        )


def count(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    ratios: tuple[float, ...],
    scaled: tuple[int, ...],
) -> tuple[int, int, int]:
    """Return parameters, multiply-adds, and those of the latter that apply the maps to states."""
    size, adds, again = 0, 0, 0

    def add(positions: int, *layers: nn.Module) -> None:
        nonlocal size, adds
        for layer in layers:
            for part in layer.modules():
                own = dict(part.named_parameters(recurse=False))
                size += sum(p.numel() for p in own.values())
                if isinstance(part, nn.Conv2d | nn.Linear):
                    adds += positions * part.weight.numel()

    half = dims[0] // 2
    with torch.device("meta"):
        for side, inner, outer in (
            (112, 3, half),
            (112, half, half),
            (56, half, dims[0]),
            (56, dims[0], dims[0]),
        ):
            add(side * side, nn.Conv2d(inner, outer, 3, bias=False), nn.BatchNorm2d(outer))
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = 56 >> stage
            n, grid, last = side * side, Grid(side, side), stage == 3
            shape = (1, heads[stage] // 2, n, dim // heads[stage])
            for _ in range(depth):
                module = A2Mamba(
                    dim=dim, heads=heads[stage], window=WINDOWS[stage], form="global" if last else "states",
                    grid=grid,
                )  # fmt: skip
                if module.ssm is not None:  # over heads, for every channel of a head
                    adds += n * heads[stage] * dim - n * heads[stage] ** 2
                add(n, module, ConvFFN(dim=dim, hidden=int(ratios[stage] * dim)))
                add(n, *(nn.Conv2d(dim, dim, 3, groups=dim) for _ in range(2)))
                add(0, *(nn.LayerNorm(dim) for _ in range(2)))
                size += 4 * dim * (stage in scaled)
                for where in module.neighborhoods(grid):
                    with torch.device("cpu"):
                        once = explain(shape, shape, shape, where=where).pairs_needed * shape[3]
                    adds += 2 * once + once * (not last)
                    again += once * (not last)
                adds += 2 * n * n * dim * last + 3 * n * dim * (not last)
            if not last:
                add(n // 4, nn.Conv2d(dim, dims[stage + 1], 3, bias=False), nn.BatchNorm2d(dims[stage + 1]))
        add(49, nn.Conv2d(dims[-1], 1024, 1), nn.BatchNorm2d(1024))
        add(1, nn.Conv2d(1024, 1000, 1))
    return size, adds, again
