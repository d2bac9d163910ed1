"""PPMA (arXiv 2506.15940): sizes and cost of the models, and what the fast algorithm for the mask saves."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.kernels.paths import path_product
from foveate.kernels.scan.watch import watch_scans
from foveate.mechanisms.scored.polyline_path_attention import PolylinePathBlock
from foveate.scores.pairs import Pairs
from foveate.scores.paths import line_sums, path_decay


class Model(NamedTuple):
    """A published configuration: four stages."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ratios: tuple[int, ...]
    chunks: tuple[bool, ...]
    scaled: tuple[bool, ...]
    size: str
    cost: str


NO = (False,) * 4
LATE = (False, False, True, True)
MODELS = {
    "PPMA-T": Model(
        (64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3, 3, 3, 3), (True, True, False, False), NO,
        "14M", "2.7G",
    ),
    "PPMA-S": Model(
        (64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 3, 3), (True, True, True, False), NO,
        "27M", "4.9G",
    ),
    "PPMA-B": Model(
        (80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4, 4, 3, 3), (True, True, True, False), LATE,
        "54M", "10.6G",
    ),
}  # fmt: skip


def figures() -> Iterator[Figure]:
    """Yield parameters and multiply-adds of the models, and pairs against scans of the mask's product."""
    for name, model in MODELS.items():
        parameters, products = count(model)
        yield Figure(
            claim=f"{name}: parameters, multiply-adds",
            paper=f"{model.size}, {model.cost}",
            ours=f"{parameters / 1e6:.1f}M, {products / 1e9:.2f}G",
            how="our blocks; stem, mergings and head counted layer by layer; 224 x 224, 1000 classes; one product "
            "q k^T and one A v per whole map (the two softmaxes share them)",
        )
    yield product(Grid(56, 56))


def count(model: Model) -> tuple[int, int]:
    """Return the parameters and the multiply-adds of an image of 224 x 224."""
    first, last, side = model.dims[0], model.dims[-1], 56
    with torch.device("meta"):
        stem = (
            (nn.Conv2d(3, first // 2, 3), 112), (nn.BatchNorm2d(first // 2), 0),
            (nn.Conv2d(first // 2, first // 2, 3), 112), (nn.BatchNorm2d(first // 2), 0),
            (nn.Conv2d(first // 2, first, 3), 56), (nn.BatchNorm2d(first), 0),
            (nn.Conv2d(first, first, 3), 56), (nn.BatchNorm2d(first), 0),
        )  # fmt: skip
        layers: list[tuple[nn.Module, int]] = [
            *stem, (nn.Linear(last, 1024), 7), (nn.BatchNorm2d(1024), 0), (nn.Linear(1024, 1000), 1),
        ]  # fmt: skip
        products = 0
        for stage, (dim, depth) in enumerate(zip(model.dims, model.depths, strict=True)):
            form, n = "chunk" if model.chunks[stage] else "whole", side * side
            block = PolylinePathBlock(
                dim=dim,
                heads=model.heads[stage],
                hidden=dim * model.ratios[stage],
                form=form,
                layer_scale=1e-6 if model.scaled[stage] else None,
            )
            layers += [(block, side)] * depth
            # Rows and columns: one product with keys and two with values each.
            products += depth * dim * n * (2 * side * 3 if form == "chunk" else 2 * n)
            if stage < 3:
                side //= 2
                layers += [
                    (nn.Conv2d(dim, model.dims[stage + 1], 3), side),
                    (nn.BatchNorm2d(model.dims[stage + 1]), 0),
                ]
    for layer, at in layers:
        products += at * at * sum(weights(part) for part in layer.modules())
    return sum(p.numel() for layer, _ in layers for p in layer.parameters()), products


def weights(part: nn.Module) -> int:
    """Return the multiply-adds of a layer per token (a thousandth is missing: `steps` acts once per head)."""
    if isinstance(part, nn.Linear | nn.Conv2d):
        return part.weight.numel()
    return 0


def product(grid: Grid) -> Figure:
    """Return exp(L) x by scans against pairs: equal, and how many multiply-adds per column of x."""
    torch.manual_seed(0)
    n = grid.numel
    across, down = (-torch.rand(1, 1, n) * 0.1 for _ in range(2))
    x = torch.randn(1, 1, n, 1)
    with watch_scans() as scans:
        fast = path_product(x, across, down, grid)
    steps = sum(s.batch * s.heads * s.n for s in scans)
    score = path_decay(line_sums(across, grid, 1), line_sums(down, grid, 0), grid)
    mask: Tensor = score.apply(torch.zeros(()), Pairs.full(n, n)).exp()
    slow = mask @ x
    apart = float((fast - slow).abs().max() / slow.abs().max())
    return Figure(
        claim="the mask applied to values: by scans O(N), explicitly O(N^2)",
        paper="orders only",
        ours=f"{steps:,} steps of scans for {n * n:,} products, {n * n // steps} times fewer; {apart:.0e} apart",
        how=f"one head, one column of values, {grid[0]} x {grid[1]} tokens",
    )
