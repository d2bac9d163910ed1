"""Scores that fall with distance: ALiBi on a sequence, `DistanceDecay` on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.scores.base import Additive, Extent
from foveate.scores.pairs import Pairs

Metric = Literal["manhattan", "euclidean", "squared", "chebyshev"]


def alibi_slopes(heads: int) -> Float[Tensor, "h"]:
    """Return ALiBi's fixed slopes (arXiv 2108.12409): 2^(-8 i / H) for H a power of two.

    Other H take the slopes of the next lower power of two P, then every second one of 2 P.

    Raises:
        ArgumentError: if `heads` is not a positive integer.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise bad("heads", heads, "a positive integer")
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


def _check_slopes(part: Additive, name: str, value: object, heads: int | None = None) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim > 1:
        shown = f"Tensor{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else value
        raise bad(f"{type(part).__name__}.{name}", shown, "a float tensor (H,) or 0-d")
    if heads is not None and value.ndim == 1 and value.shape[0] not in (1, heads):
        raise bad(f"{type(part).__name__}.{name}", tuple(value.shape), f"({heads},), one per head")


def _spread(slopes: Tensor, distance: Tensor) -> Tensor:
    """Multiply `(H,)` slopes with distances `(b, h, ...)`."""
    slopes = slopes.reshape(-1, *([1] * (distance.ndim - 2)))
    return slopes * distance.to(slopes.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class ALiBi(Additive):
    """Add `-slope_h * |j - i|`, or with `signed=True` `slope_h * (j - i)` (arXiv 2108.12409).

    The two agree on causal pairs. The query's position i is its index plus N_k - N_q (decoding), or the
    index itself with align="start".

    Args:
        slopes: float `(H,)` or 0-d; `alibi_slopes(H)` gives the published ones. They may carry gradients.
        signed: whether keys after the query are raised instead of lowered.
        align: where the first query stands.
    """

    slopes: Tensor
    signed: bool = False
    align: Literal["end", "start"] = "end"

    def __post_init__(self):
        _check_slopes(self, "slopes", self.slopes)
        if self.align not in ("end", "start"):
            raise bad("ALiBi.align", self.align, "'end' or 'start'")

    def check(self, extent: Extent) -> None:
        """Raise unless there is one slope per head."""
        _check_slopes(self, "slopes", self.slopes, extent.heads)

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the bias at the pairs."""
        (offset,) = at.offsets(None)
        if self.align == "end":
            real = at.n_k if at.frame is None else at.frame.base.numel
            offset = offset - (real - at.n_q)
        return _spread(self.slopes, offset if self.signed else -offset.abs())


@dataclass(frozen=True, eq=False, repr=False)
class DistanceDecay(Additive):
    """Add `-rate_h * distance(q, k)` on a grid: ALiBi in several dimensions, and Manhattan decay in logits.

    Args:
        rate: float `(H,)` or 0-d, with gradient.
        grid: geometry of queries and keys.
        metric: "manhattan", "euclidean", "squared" (euclidean without the root) or "chebyshev".
        lead: tokens before the grid, at distance 0 of everything.
    """

    rate: Tensor
    grid: Grid
    metric: Metric = "manhattan"
    lead: int = 0

    def __post_init__(self):
        _check_slopes(self, "rate", self.rate)
        if not isinstance(self.grid, Grid):
            raise bad("DistanceDecay.grid", self.grid, "a Grid")
        if self.metric not in ("manhattan", "euclidean", "squared", "chebyshev"):
            raise bad(
                "DistanceDecay.metric", self.metric, "'manhattan', 'euclidean', 'squared' or 'chebyshev'"
            )

    def check(self, extent: Extent) -> None:
        """Raise unless the grid fits N_q and N_k and there is one rate per head."""
        _check_slopes(self, "rate", self.rate, extent.heads)
        self.grid.check_tokens(extent.n_q - self.lead, "N_q")
        self.grid.check_tokens(extent.n_k - self.lead, "N_k")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the bias at the pairs."""
        offsets = [o.abs() for o in at.offsets(self.grid, lead=self.lead)]
        distance = offsets[0]
        if self.metric == "chebyshev":
            for o in offsets[1:]:
                distance = torch.maximum(distance, o)
        elif self.metric == "manhattan":
            for o in offsets[1:]:
                distance = distance + o
        else:
            distance = distance * distance
            for o in offsets[1:]:
                distance = distance + o * o
        distance = distance.to(self.rate.dtype)
        if self.metric == "euclidean":
            distance = distance.sqrt()
        if self.lead:
            real = (at.q >= self.lead)[..., :, None] & (at.k >= self.lead)[..., None, :]
            distance = distance * real.to(distance.dtype)
        return -_spread(self.rate, distance)
