"""What `sample` is asked: one validated call, its positions in pixels, and the pixels around a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.dtypes import FLOATS, accumulation_dtype
from foveate.core.errors import bad

Coords = Literal["centers", "corners", "pixels"]
COORDS = ("centers", "corners", "pixels")
AXES = "(batch, heads, queries, levels, points, coordinates)"


@dataclass(frozen=True)
class SampleProblem:
    """One validated call, everything in the accumulation dtype.

    Attributes:
        levels: per level (B, M, C, *spatial).
        pixels: per level (B, M, Q, P, axes), positions in pixels: pixel i of an axis stands at i. Axes count
            from the last one of the map (x, y, z); the depth, where there is a factor, comes last.
        weights: (B, M, Q, L, P), or None for no sum.
        factor: per level (B, 1 or M, D, *spatial), or None.
        coords: what the caller's points meant, for backends that are exact for some of them only.
    """

    levels: tuple[Tensor, ...]
    pixels: tuple[Tensor, ...]
    weights: Tensor | None
    factor: tuple[Tensor, ...] | None
    coords: Coords

    @property
    def ndim(self) -> int:
        """Number of axes of the maps, the factor's depth not counted."""
        return self.levels[0].ndim - 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: (B, M, Q, C), or (B, M, Q, L, P, C) without weights."""
        b, m, q, p, _ = self.pixels[0].shape
        inside = (len(self.levels), p) if self.weights is None else ()
        return (b, m, q, *inside, self.levels[0].shape[2])


def prepare(
    levels: Sequence[Tensor],
    points: Tensor,
    weights: Tensor | None,
    factor: Sequence[Tensor] | None,
    coords: Coords,
) -> SampleProblem:
    """Validate one call, bring it to the accumulation dtype and its positions to pixels.

    Raises:
        ArgumentError: naming the argument whose rank, shape, dtype, device or value cannot be right.
    """
    if coords not in COORDS:
        raise bad("coords", coords, f"one of {COORDS}")
    levels = _check_levels(levels)
    factor = None if factor is None else _check_factor(factor, levels)
    _check_points(points, weights, levels, factor is not None)
    dtype = levels[0].dtype
    for x in (points, *([] if weights is None else [weights]), *(factor or ())):
        dtype = torch.promote_types(dtype, x.dtype)
    dtype = accumulation_dtype(dtype)
    pixels = []
    for index, level in enumerate(levels):
        sizes = tuple(reversed(level.shape[3:])) + (() if factor is None else (factor[index].shape[2],))
        pixels.append(_pixels(points[:, :, :, index].to(dtype), sizes, coords))
    return SampleProblem(
        levels=tuple(x.to(dtype) for x in levels),
        pixels=tuple(pixels),
        weights=None if weights is None else weights.to(dtype),
        factor=None if factor is None else tuple(x.to(dtype) for x in factor),
        coords=coords,
    )


def corners(
    pixels: Float[Tensor, "*shape axes"], sizes: Sequence[int]
) -> tuple[Int[Tensor, "*shape corners"], Float[Tensor, "*shape corners"]]:
    """Return the pixels around each position, as ids of the row-major map, and their multi-linear weights.

    Args:
        pixels: positions, the last axis of the map first.
        sizes: of the map, per coordinate in the order of `pixels`.

    Returns:
        2^axes ids, always in range, and as many weights, 0 for pixels outside the map. The last axis of the
        map varies fastest: at 2 axes the order is (y, x), (y, x+1), (y+1, x), (y+1, x+1).
    """
    ids, weights, stride = None, None, 1
    for axis, size in enumerate(sizes):
        # Far outside is as good as just outside, and fits an integer; clamping also stops the gradient.
        at = pixels[..., axis].clamp(-1, size)
        low = at.detach().floor()
        part = at - low
        pair = torch.stack([low, low + 1], dim=-1).long()
        inside = (pair >= 0) & (pair < size)
        share = torch.stack([1 - part, part], dim=-1) * inside
        pair = pair.clamp(0, size - 1) * stride
        if ids is None or weights is None:
            ids, weights = pair, share
        else:
            ids = (pair[..., :, None] + ids[..., None, :]).flatten(-2)
            weights = (share[..., :, None] * weights[..., None, :]).flatten(-2)
        stride *= size
    assert ids is not None
    assert weights is not None
    return ids, weights


def _pixels(points: Tensor, sizes: tuple[int, ...], coords: Coords) -> Tensor:
    """Positions in pixels from what the caller's coordinates mean."""
    if coords == "pixels":
        return points
    size = torch.tensor(sizes, dtype=points.dtype, device=points.device)
    return points * (size - 1) if coords == "corners" else points * size - 0.5


def _check_levels(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps of one batch, number of heads and channels, dtype and device, with 1 to 3 axes each."""
    if isinstance(levels, Tensor):
        raise bad("levels", tuple(levels.shape), "a sequence of maps", "Write [x] for a single level.")
    levels = tuple(levels)
    if not levels:
        raise bad("levels", levels, "at least one map")
    first = levels[0]
    for index, x in enumerate(levels):
        name, shape = f"levels[{index}]", tuple(x.shape)
        if x.dtype not in FLOATS:
            raise bad(name, x.dtype, "a floating point dtype", "Convert it with .float() first.")
        if x.dtype != first.dtype:
            raise bad(name, x.dtype, f"{first.dtype}, as levels[0]")
        if not 4 <= x.ndim <= 6:
            raise bad(name, shape, "(batch, heads, channels, *spatial) with 1 to 3 spatial axes")
        if x.ndim != first.ndim or shape[:3] != tuple(first.shape[:3]):
            raise bad(name, shape, f"{(*first.shape[:3], '...')} with {first.ndim - 3} spatial axes")
        if 0 in shape[3:]:
            raise bad(name, shape, "at least one pixel along every axis")
        _on(name, x, first)
    return levels


def _check_factor(factor: Sequence[Tensor], levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One (B, M or 1, D, *spatial) per level; (B, D, *spatial) gets its axis of heads."""
    if isinstance(factor, Tensor):
        raise bad("factor", tuple(factor.shape), "a sequence with one tensor per level", "Write [x] for one.")
    factor = tuple(factor)
    if len(factor) != len(levels):
        raise bad("factor", f"{len(factor)} tensors", f"{len(levels)}, one per level")
    found = []
    for index, (x, level) in enumerate(zip(factor, levels, strict=True)):
        name, shape = f"factor[{index}]", tuple(x.shape)
        b, m, _, *spatial = level.shape
        _float_on(name, x, level)
        per_head = x if x.ndim == level.ndim else x.unsqueeze(1)
        if (
            per_head.ndim != level.ndim
            or per_head.shape[0] != b
            or per_head.shape[1] not in (1, m)
            or list(per_head.shape[3:]) != spatial
            or per_head.shape[2] == 0
        ):
            raise bad(name, shape, f"{(b, 'D', *spatial)} or {(b, m, 'D', *spatial)}, as levels[{index}]")
        found.append(per_head)
    return tuple(found)


def _check_points(points: Tensor, weights: Tensor | None, levels: tuple[Tensor, ...], depth: bool) -> None:
    """Points and weights fit the levels and each other."""
    first = levels[0]
    _float_on("points", points, first)
    if points.ndim != 6:
        raise bad("points", tuple(points.shape), f"6 axes {AXES}")
    b, m = first.shape[:2]
    q, p = points.shape[2], points.shape[4]
    wanted = (b, m, q, len(levels), p, first.ndim - 3 + depth)
    if tuple(points.shape) != wanted:
        expected = f"{(b, m, 'Q', len(levels), 'P', wanted[-1])}: {AXES}"
        hint = "With a factor its depth is one more coordinate, the last." if depth else ""
        raise bad("points", tuple(points.shape), expected, hint)
    if weights is not None:
        _float_on("weights", weights, first)
        if tuple(weights.shape) != wanted[:-1]:
            raise bad("weights", tuple(weights.shape), f"{wanted[:-1]}: points without their last axis")


def _float_on(name: str, x: Tensor, first: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise bad(name, x.dtype, "a floating point dtype", "Convert it with .float() first.")
    _on(name, x, first)


def _on(name: str, x: Tensor, first: Tensor) -> None:
    if x.device != first.device:
        hint = "Move the tensors together."
        raise bad(name, str(x.device), f"the device of levels[0], {first.device}", hint)
