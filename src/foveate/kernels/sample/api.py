"""`sample`: the primitive for mechanisms whose keys stand between the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import UnsupportedError, unknown
from foveate.kernels.sample import bag, grid, reference
from foveate.kernels.sample.contract import Coords, SampleProblem, prepare

BACKENDS = ("auto", "bag", "grid_sample", "reference")
RUN = {"bag": bag.run, "grid_sample": grid.run, "reference": reference.run}


def sample(
    levels: Sequence[Float[Tensor, "b m c ..."]],
    points: Float[Tensor, "b m q l p axes"],
    weights: Float[Tensor, "b m q l p"] | None = None,
    *,
    factor: Sequence[Float[Tensor, "b ..."]] | None = None,
    coords: Coords = "centers",
    backend: str = "auto",
) -> Float[Tensor, "b m q *rest c"]:
    """Read feature maps between their pixels and add up: out[q] = sum_{l, p} weights[q, l, p] V_l(points[q, l, p]).

    V_l(x) is multi-linear (linear, bilinear, trilinear) in the 2^axes pixels around x; beyond the border a map
    is 0, so that a point counts from one pixel outside on, -1 < x < size. Nothing is normalised: weights are
    whatever a mechanism makes them. Differentiable in levels, points (one-sided where they hit a pixel),
    weights and factor.

    With a `factor` F the maps get one more axis without the volume being built: V_l(x, d) is the multi-linear
    value of the product level[pixel] * F[bin, pixel] at position x and depth d, computed as
    sum over pixels n around x of w_n(x) F[n](d) level[n] (DFA3D, arXiv 2307.12972).

    Args:
        levels: L maps (B, M, C, *spatial) with 1, 2 or 3 spatial axes and one dtype; sizes may differ.
        points: (B, M, Q, L, P, axes), P positions per query and level. Coordinates stand in the order of
            torch's grid_sample, last axis of the map first: (x,), (x, y) or (x, y, z); with a factor the depth
            is one more, the last. Keep them in float32 when the maps have less.
        weights: (B, M, Q, L, P), or None: nothing is added up and every point gives its value.
        factor: L tensors (B, D, *spatial), or (B, M, D, *spatial) for one per head, such as distributions over
            D bins of depth; D may differ between levels.
        coords: "centers": points in [0, 1] over the area of the map, pixel i at (i + 1/2) / size
            (align_corners=False); "corners": from first to last pixel, i / (size - 1) (align_corners=True);
            "pixels": pixel i at i, on every level its own. The depth follows the same rule.
        backend: "reference" gathers every pixel and multiplies a factor out: the truth, differentiable any
            number of times. "bag" folds all factors into one weight per pixel and adds rows of a table: bounded
            memory besides input and output. "grid_sample" is torch's, which stores the value of every point,
            is often faster backward, has no 1-D and no factor, and rounds positions to [-1, 1]. "auto" takes
            "bag", but "grid_sample" for few channels that are not added up.

    Returns:
        (B, M, Q, C), or (B, M, Q, L, P, C) without weights, in the dtype of the levels. Positions, weights and
        sums are computed in float32, or float64 where any input has it.

    Raises:
        ArgumentError: naming the argument that cannot be right.
        UnsupportedError: when a named backend cannot, with the reason.
    """
    problem = prepare(levels, points, weights, factor, coords)
    name = choose(problem, backend)
    # Under autocast products would be rounded to half precision; the contract is float32.
    with torch.autocast(device_type=points.device.type, enabled=False):
        return RUN[name](problem).to(levels[0].dtype)


def choose(problem: SampleProblem, backend: str) -> str:
    """Return the backend that computes `problem`.

    Raises:
        UnknownNameError: for a name that is none.
        UnsupportedError: when the named backend cannot, with the reason.
    """
    if backend not in BACKENDS:
        raise unknown("backend of sample", str(backend), BACKENDS)
    refusal = grid.refusal(problem)
    if backend == "grid_sample" and refusal is not None:
        raise UnsupportedError(f"backend 'grid_sample' cannot serve this call: {refusal}. Use backend='bag'.")
    if backend != "auto":
        return backend
    if refusal is None and problem.weights is None and problem.coords != "pixels":
        # Without a sum it stores no more than the result, and is ahead while a row is short.
        return "grid_sample" if problem.levels[0].shape[2] <= 32 else "bag"
    return "bag"
