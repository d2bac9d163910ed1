"""`Patches`: equal boxes laid over a grid at a regular distance, as ids of the tokens each of them holds.

Along an axis, box c holds the positions `start + stride * c + dilation * t` for t < size. Boxes may overlap,
leave gaps or leave the grid; what stands for a position outside the grid is said by `border`:

    mask      nothing does: the id is -1 (what a zero-padded unfolding reads there counts nothing)
    reflect   its mirror image, the token at the border not repeated
    shift     the token one box length further inside. A box that fits the axis then holds the very tokens of
              the box moved inside the axis, in cyclic order: copy-shift padding (arXiv 2404.16573)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.lazy import cached_property
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Combine, Schedule

PatchBorder = Literal["mask", "reflect", "shift"]
_BORDERS = ("mask", "reflect", "shift")


@dataclass(frozen=True)
class Patches:
    """Boxes of `size` tokens, `stride` apart, `counts` of them per axis; row-major, as are their tokens.

    Args:
        grid: token geometry.
        size: tokens of a box, per axis.
        stride: distance of consecutive boxes, per axis.
        counts: boxes, per axis.
        start: position of the first box's first token, per axis; may be negative.
        dilation: distance of neighbouring tokens of a box, per axis.
        border: what stands for positions outside the grid (see the top of this file).

    Raises:
        ArgumentError: naming the argument. `tokens` raises, naming `grid`, where the border rule would leave
            the grid again: it is too small to be reflected or shifted that far.
    """

    grid: Grid
    size: tuple[int, ...]
    stride: tuple[int, ...]
    counts: tuple[int, ...]
    start: tuple[int, ...]
    dilation: tuple[int, ...]
    border: PatchBorder

    def __init__(
        self,
        grid: Grid,
        size: int | Sequence[int],
        *,
        stride: int | Sequence[int],
        counts: int | Sequence[int],
        start: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        border: PatchBorder = "mask",
    ):
        given = {"size": size, "stride": stride, "counts": counts, "start": start, "dilation": dilation}
        for name, value in given.items():
            values = grid.per_axis(value, name)
            if name != "start" and min(values) < 1:
                raise bad(name, value, "integers >= 1")
            object.__setattr__(self, name, values)
        if border not in _BORDERS:
            raise bad("border", border, f"one of {', '.join(map(repr, _BORDERS))}")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "border", border)

    @property
    def numel(self) -> int:
        """Number of boxes."""
        return math.prod(self.counts)

    @cached_property
    def tokens(self) -> Int[Tensor, "boxes m"]:
        """Token ids of every box, -1 where there is none."""
        total = None
        for axis in range(self.grid.ndim):
            at = self.positions(axis)
            if total is None:
                total = at
                continue
            absent = (total[:, None, :, None] < 0) | (at[None, :, None, :] < 0)
            joined = total[:, None, :, None] * self.grid[axis] + at[None, :, None, :]
            total = joined.masked_fill(absent, -1).flatten(2, 3).flatten(0, 1)
        assert total is not None
        return total

    def positions(self, axis: int) -> Int[Tensor, "boxes m"]:
        """Return the positions of the boxes along one axis, the border rule applied.

        Raises:
            ArgumentError: naming `grid`, where the rule leaves the grid again.
        """
        length, size, step = self.grid[axis], self.size[axis], self.dilation[axis]
        first = self.start[axis] + self.stride[axis] * torch.arange(self.counts[axis])
        at = first[:, None] + step * torch.arange(size)
        before, after = at < 0, at >= length
        if self.border == "mask":
            return at.masked_fill(before | after, -1)
        lowest = self.start[axis]
        highest = lowest + self.stride[axis] * (self.counts[axis] - 1) + step * (size - 1)
        over = max(-lowest, highest - (length - 1), 0)
        if self.border == "reflect":
            if over >= length:
                hint = f"Boxes reach {over} beyond it, and only {length - 1} positions can be reflected."
                raise bad("grid", self.grid, f"more than {over} positions on axis {axis}", hint)
            return torch.where(before, -at, torch.where(after, 2 * (length - 1) - at, at))
        span = size * step
        if over > span or (over and span > length):
            hint = f"Boxes of {span} positions, reaching {over} beyond it, cannot be moved inside."
            raise bad("grid", self.grid, f"at least {span} positions on axis {axis}", hint)
        return torch.where(before, at + span, torch.where(after, at - span, at))

    def schedule(self, combine: Combine = "sum") -> Schedule:
        """Return one cell per box, in which its tokens meet one another.

        Args:
            combine: how the boxes of one token combine; "sum" folds them back onto the grid.
        """
        ids = self.tokens[None, None]
        return Schedule(self.grid.numel, self.grid.numel, (ExplicitGroup(ids, ids),), combine)
