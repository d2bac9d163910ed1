"""Regions of a grid, and routing from regions to regions by their pooled content."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.lazy import cached_property
from foveate.patterns.selection import Selection


@dataclass(frozen=True)
class Regions:
    """A grid cut into boxes of `size` tokens per axis, row-major; the last ones of an axis may be smaller.

    Args:
        grid: token geometry.
        size: tokens per axis of a region, one integer per axis.
    """

    grid: Grid
    size: tuple[int, ...]

    def __post_init__(self):
        if len(self.size) != self.grid.ndim or any(s < 1 for s in self.size):
            raise bad("size", self.size, f"{self.grid.ndim} positive integers for {self.grid}")

    @classmethod
    def of_count(cls, grid: Grid, count: int | Sequence[int]) -> Regions:
        """Cut every axis into at most `count` regions of equal size (the last one may be smaller).

        Raises:
            ArgumentError: naming `count`, unless it is between 1 and the axis.
        """
        counts = grid.per_axis(count, "count")
        if any(not 1 <= c <= s for c, s in zip(counts, grid, strict=True)):
            raise bad("count", count, f"between 1 and the axis, for {grid}")
        return cls(grid, tuple(math.ceil(s / c) for s, c in zip(grid, counts, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Regions per axis."""
        return tuple(math.ceil(n / s) for n, s in zip(self.grid, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Number of regions."""
        return math.prod(self.counts)

    def whole(self) -> Regions:
        """Return the regions of the map padded until all of them are whole."""
        sizes = (c * s for c, s in zip(self.counts, self.size, strict=True))
        return Regions(Grid(*sizes), self.size)

    @cached_property
    def tokens(self) -> Int[Tensor, "regions t"]:
        """Token ids of each region, row-major; -1 fills up the smaller regions."""
        inside = Grid(*self.size).coords()  # (t, axes)
        corner = Grid(*self.counts).coords() * torch.tensor(self.size)  # (regions, axes)
        coords = corner[:, None] + inside[None]
        present = (coords < torch.tensor(self.grid.sizes)).all(-1)
        ids = self.grid.ravel(coords.unbind(-1))
        return ids.masked_fill(~present, -1)

    def pool(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b regions c"]:
        """Return the mean over the tokens of each region."""
        tokens = self.tokens.to(x.device)
        present = (tokens >= 0).to(x.dtype)
        rows = x[:, tokens.clamp(min=0)] * present[..., None]
        return rows.sum(2) / present.sum(1)[:, None]


def top_regions(
    queries: Float[Tensor, "b regions c"], keys: Float[Tensor, "b regions c"], k: int
) -> tuple[Float[Tensor, "b regions k"], Int[Tensor, "b regions k"]]:
    """Return, for each region, the `k` regions with the largest product: (logits, ids), best first.

    Raises:
        ArgumentError: naming `k`, unless 1 <= k <= regions.
    """
    n = keys.shape[1]
    if not 1 <= k <= n:
        raise bad("k", k, f"between 1 and the {n} regions")
    found = (queries @ keys.transpose(-1, -2)).topk(k, dim=-1)
    return found.values, found.indices


def select_regions(regions: Regions, chosen: Int[Tensor, "b regions k"]) -> Selection:
    """Return the selection in which tokens of region r attend to all tokens of regions `chosen[:, r]`.

    One cell per region, shared by all heads.
    """
    tokens = regions.tokens.to(chosen.device)
    keys = tokens[chosen].flatten(2)  # (b, regions, k * t)
    n = regions.grid.numel
    return Selection(tokens[None, None], keys[:, None], n_q=n, n_k=n)
