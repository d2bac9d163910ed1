"""`sample` by torch's own `grid_sample`, level by level; values of single points are stored."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from foveate.kernels.sample.contract import SampleProblem


def refusal(p: SampleProblem) -> str | None:
    """Say why torch's grid_sample cannot compute `p`, None when it can."""
    if p.factor is not None:
        return "torch's grid_sample knows no factor, and the volume is not to be built"
    if p.ndim == 1:
        return "torch's grid_sample takes maps of 2 or 3 axes, these have 1"
    return None


def run(p: SampleProblem) -> Float[Tensor, "b m q *rest c"]:
    """Sample every level, then sum over points."""
    b, m, q, points, axes = p.pixels[0].shape
    c = p.levels[0].shape[2]
    found = []
    for level, pixels in zip(p.levels, p.pixels, strict=True):
        size = pixels.new_tensor(tuple(reversed(level.shape[3:])))
        # Pixel i has its centre at (2 i + 1) / size - 1.
        at = ((2 * pixels + 1) / size - 1).reshape(b * m, *[1] * (axes - 2), q, points, axes)
        values = grid_sample(level.flatten(0, 1), at, padding_mode="zeros", align_corners=False)
        found.append(values.reshape(b, m, c, q, points))
    values = torch.stack(found, dim=4)
    if p.weights is None:
        return values.permute(0, 1, 3, 4, 5, 2)
    return (values * p.weights.unsqueeze(2)).sum((4, 5)).transpose(2, 3)
