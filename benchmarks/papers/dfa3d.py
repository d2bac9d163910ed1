"""DFA3D (arXiv 2307.12972): the volume that is not built, and that nothing is lost by not building it."""

from collections.abc import Iterator

import torch
from torch.nn.functional import grid_sample

from benchmarks.papers import Figure
from foveate.kernels.sample import sample
from foveate.measure.memory import peak_bytes

# One camera of 900 x 1600 pixels at strides 8 to 64, as BEVFormer-base has it.
SIZES = ((116, 200), (58, 100), (29, 50), (15, 25))
CHANNELS, BINS = 256, 112


def figures() -> Iterator[Figure]:
    """Yield the sizes of both forms, their difference, and the memory they take."""
    pixels = sum(h * w for h, w in SIZES)
    volume, factors = pixels * BINS * CHANNELS, pixels * (BINS + CHANNELS)
    yield Figure(
        claim="numbers held for one camera: features times depth, against features and depth",
        paper=f"S D C = {volume / 1e6:.0f}M against S (C + D)",
        ours=f"{volume / 1e6:.0f}M against {factors / 1e6:.1f}M, {volume / factors:.0f}x",
        how=f"4 levels, {pixels} pixels, C = {CHANNELS}, D = {BINS}",
    )
    g = torch.Generator().manual_seed(0)
    maps, depth, points = inputs(g, (12, 20), 64, torch.float64)
    worst = (lifted(maps, depth, points) - explicit(maps, depth, points)).abs().max()
    yield Figure(
        claim="largest difference from trilinear sampling of the explicit volume",
        paper="mathematically equivalent",
        ours=f"{worst:.0e} in float64",
        how=f"one 12 x 20 map, 8 heads of 4, {BINS} bins, 64 queries of 8 points",
    )
    given = inputs(g, (29, 50), 200, torch.float32)
    for x in given:
        x.requires_grad_()

    def peak(form) -> int:
        return peak_bytes(lambda: torch.autograd.grad(form(*given).sum(), given)) or 0

    ours, theirs = peak(lifted), peak(explicit)
    yield Figure(
        claim="peak memory, forward and backward, against the explicit volume",
        paper="not given for the operator alone",
        ours=f"{theirs / ours:.0f}x less ({ours / 2**20:.1f} MiB against {theirs / 2**20:.0f} MiB)",
        how=f"one 29 x 50 map, 8 heads of 4, {BINS} bins, 200 queries of 8 points, float32, CPU",
    )


def inputs(g: torch.Generator, size: tuple[int, int], queries: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a map, its depth distributions and points."""
    maps = torch.randn(1, 8, 4, *size, generator=g, dtype=dtype)
    depth = torch.randn(1, BINS, *size, generator=g, dtype=dtype).softmax(1)
    return [maps, depth, torch.rand(1, 8, queries, 1, 8, 3, generator=g, dtype=dtype)]


def lifted(maps: torch.Tensor, depth: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the values at all points, the volume not built."""
    return sample([maps], points, factor=[depth])[:, :, :, 0]


def explicit(maps: torch.Tensor, depth: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the same from the volume."""
    volume = maps.unsqueeze(3) * depth[:, None, None]
    at = (2 * points[:, :, :, 0] - 1).flatten(0, 1).unsqueeze(1)
    values = grid_sample(volume.flatten(0, 1), at, align_corners=False)
    return values.reshape(*maps.shape[:3], *points.shape[2:5:2]).movedim(2, -1)
