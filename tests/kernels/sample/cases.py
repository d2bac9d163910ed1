"""Problems for `sample`, and what they mean written down in loops."""

import itertools
import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch
from torch import Tensor

from foveate.kernels.sample import sample


@dataclass(frozen=True)
class Case:
    levels: tuple[Tensor, ...]
    points: Tensor
    weights: Tensor | None
    factor: tuple[Tensor, ...] | None
    coords: str = "centers"

    @property
    def leaves(self) -> list[Tensor]:
        return [
            *self.levels,
            self.points,
            *([self.weights] if self.weights is not None else []),
            *(self.factor or ()),
        ]

    def run(self, backend="auto"):
        return sample(
            self.levels, self.points, self.weights, factor=self.factor, coords=self.coords, backend=backend
        )

    def to(self, dtype) -> "Case":
        def cast(x):
            return None if x is None else x.detach().to(dtype).requires_grad_()

        return replace(
            self,
            levels=tuple(map(cast, self.levels)),
            points=cast(self.points),
            weights=cast(self.weights),
            factor=None if self.factor is None else tuple(map(cast, self.factor)),
        )


def make(
    *,
    b=2,
    m=2,
    c=3,
    q=4,
    p=3,
    sizes=((5, 4), (3, 2)),
    weighted=True,
    bins=None,
    per_head=False,
    seed=0,
    coords="centers",
) -> Case:
    """Points lie inside and around the maps; `bins` per level makes a factor."""
    g = torch.Generator().manual_seed(seed)
    axes = len(sizes[0]) + (bins is not None)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    points = torch.rand((b, m, q, len(sizes), p, axes), generator=g, dtype=torch.float64) * 1.8 - 0.4
    if coords == "pixels":
        points = (
            points
            * torch.tensor([[*s[::-1], *([bins[i]] if bins else [])] for i, s in enumerate(sizes)])[:, None]
        )
    factor = None
    if bins is not None:
        factor = tuple(randn(b, *([m] if per_head else []), d, *s) for d, s in zip(bins, sizes, strict=True))
    return Case(
        levels=tuple(randn(b, m, c, *s) for s in sizes),
        points=points.requires_grad_(),
        weights=randn(b, m, q, len(sizes), p) if weighted else None,
        factor=factor,
        coords=coords,
    )


@st.composite
def cases(draw) -> Case:
    ndim = draw(st.integers(1, 3))
    n_levels = draw(st.integers(1, 3))
    side = st.integers(1, 6 - ndim)
    sizes = tuple(tuple(draw(side) for _ in range(ndim)) for _ in range(n_levels))
    bins = tuple(draw(st.integers(1, 4)) for _ in sizes) if draw(st.booleans()) else None
    return make(
        b=draw(st.integers(0, 2)),
        m=draw(st.integers(1, 2)),
        c=draw(st.integers(1, 3)),
        q=draw(st.integers(0, 3)),
        p=draw(st.integers(0, 3)),
        sizes=sizes,
        weighted=draw(st.booleans()),
        bins=bins,
        per_head=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
        coords=draw(st.sampled_from(["centers", "corners", "pixels"])),
    )


def tent(x: float, i: int) -> float:
    """The share of pixel i in the linear value at x."""
    return max(0.0, 1 - abs(x - i))


def in_loops(case: Case) -> Tensor:
    """Every pixel of every map times its tent function, position by position: no floor, no corners."""
    b, m, q, n_levels, p, _ = case.points.shape
    values = torch.zeros(b, m, q, n_levels, p, case.levels[0].shape[2], dtype=torch.float64)
    for at in itertools.product(*map(range, (b, m, q, n_levels, p))):
        i_b, i_m, _, index, _ = at
        level, sizes = case.levels[index][i_b, i_m], case.levels[index].shape[3:][::-1]
        volume = level
        if case.factor is not None:
            factor = (
                case.factor[index][i_b]
                if case.factor[index].ndim == level.ndim + 1
                else case.factor[index][i_b, i_m]
            )
            volume, sizes = level.unsqueeze(1) * factor, (*sizes, factor.shape[0])
        place = [pixel(x, s, case.coords) for x, s in zip(case.points[at].tolist(), sizes, strict=True)]
        # A volume's axes are (depth, ..., y, x); coordinates come as (x, y, ..., depth).
        axes = place[::-1] if case.factor is None else [place[-1], *place[:-1][::-1]]
        for pixel_ids in itertools.product(*map(range, volume.shape[1:])):
            share = math.prod(tent(x, i) for x, i in zip(axes, pixel_ids, strict=True))
            values[at] += share * volume[(slice(None), *pixel_ids)].detach()
    return values if case.weights is None else (values * case.weights.detach()[..., None]).sum((3, 4))


def pixel(x: float, size: int, coords: str) -> float:
    return {"centers": x * size - 0.5, "corners": x * (size - 1), "pixels": x}[coords]
