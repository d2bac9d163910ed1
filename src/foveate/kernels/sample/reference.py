"""The plain form of `sample`: gather every pixel around every position. Truth, slow and large on purpose."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.sample.contract import SampleProblem, corners


def run(p: SampleProblem) -> Float[Tensor, "b m q *rest c"]:
    """Interpolate value by value, differentiable any number of times.

    A factor is multiplied out to the volume level x factor, one axis more: what the factor means.
    """
    found = []
    for index, level in enumerate(p.levels):
        if p.factor is not None:
            level = level.unsqueeze(3) * p.factor[index].unsqueeze(2)
        found.append(interpolate(level, p.pixels[index]))
    values = torch.stack(found, dim=3)
    return values if p.weights is None else (values * p.weights.unsqueeze(-1)).sum((3, 4))


def interpolate(
    level: Float[Tensor, "b m c *spatial"], pixels: Float[Tensor, "b m q p axes"]
) -> Float[Tensor, "b m q p c"]:
    """Return the multi-linear values of one map at positions in pixels, 0 beyond its border."""
    ids, weights = corners(pixels, tuple(reversed(level.shape[3:])))
    flat = level.flatten(3)
    around = flat.gather(3, ids.flatten(2).unsqueeze(2).expand(-1, -1, flat.shape[2], -1))
    around = around.unflatten(3, ids.shape[2:])
    return (around * weights.unsqueeze(2)).sum(-1).movedim(2, -1)
