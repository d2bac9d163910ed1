"""Boxes that overlap: every token of a box attends to all of it, and what its boxes say is combined."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Combine, Mean, Schedule, Weights


def overlap_starts(length: int, size: int, stride: int) -> list[int]:
    """Return where boxes of `size` start along an axis: `stride` apart, the last one moved inside."""
    return [min(start, length - size) for start in range(0, length - size + stride, stride)]


def overlap_tokens(
    grid: Grid, size: int | Sequence[int], stride: int | Sequence[int]
) -> Int[Tensor, "boxes t"]:
    """Return the token ids of every box, boxes and tokens row-major.

    Args:
        grid: token geometry.
        size: tokens of a box per axis, at most the axis.
        stride: distance of boxes per axis, between 1 and the size, so that no token is left out.

    Raises:
        ArgumentError: naming `size` or `stride`.
    """
    sizes, strides = grid.per_axis(size, "size"), grid.per_axis(stride, "stride")
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for length, s, step in zip(grid, sizes, strides, strict=True):
        if not 1 <= s <= length:
            raise bad("size", size, f"between 1 and the axis, for {grid}")
        if not 1 <= step <= s:
            raise bad("stride", stride, f"between 1 and the size, {s}", "Larger strides would leave gaps.")
        axis = torch.tensor(overlap_starts(length, s, step))[:, None] + torch.arange(s)
        ids = (ids[:, None, :, None] * length + axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return ids


def overlapping(
    grid: Grid, size: int | Sequence[int], stride: int | Sequence[int], combine: Combine | None = None
) -> Schedule:
    """Return the schedule of attention inside overlapping boxes; the same object for the same arguments.

    Args:
        grid, size, stride: as in `overlap_tokens`.
        combine: how the boxes of a token combine, the mean by default.
    """
    combine = Mean() if combine is None else combine
    sizes, strides = grid.per_axis(size, "size"), grid.per_axis(stride, "stride")
    if isinstance(combine, Weights):  # holds tensors, which no cache should keep alive
        return _schedule(grid, sizes, strides, combine)
    return _cached(grid, sizes, strides, combine)


def _schedule(grid: Grid, size: tuple[int, ...], stride: tuple[int, ...], combine: Combine) -> Schedule:
    ids = overlap_tokens(grid, size, stride)[None, None]
    return Schedule(grid.numel, grid.numel, (ExplicitGroup(ids, ids),), combine)


_cached = lru_cache(maxsize=32)(_schedule)
