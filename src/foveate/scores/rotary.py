"""Rotary position embedding of queries and keys (arXiv 2104.09864), done before `attend`.

Pairs of channels are rotated by an angle that grows with the position, so that q.k depends on positions
only through their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid

Style = Literal["half", "interleaved"]


def rotary(
    x: Float[Tensor, "*batch n d"],
    positions: Num[Tensor, "*#batch n"] | None = None,
    *,
    base: float = 10000.0,
    style: Style = "half",
    dims: int | None = None,
) -> Float[Tensor, "*batch n d"]:
    """Rotate channel pair i of `x` by `position * base^(-2 i / dims)`.

    Args:
        x: queries or keys, `(B, H, N, D)` or any leading dimensions.
        positions: integers or floats that broadcast to `(*batch, N)`: `(N,)` for all, or free ones per
            batch, head and token. None counts from 0.
        base: the slowest pair turns by about 1 / base per step.
        style: "half" pairs channel i with i + dims / 2, "interleaved" pairs 2 i with 2 i + 1.
        dims: rotate only the first `dims` channels, all by default. Must be even.

    Returns:
        A tensor like `x`; angles are computed in float32 (float64 for float64).

    Raises:
        ArgumentError: if `dims` is odd or larger than D, or positions do not fit.
    """
    d = x.shape[-1]
    dims = d if dims is None else dims
    if dims % 2 or not 0 <= dims <= d:
        raise bad("dims", dims, f"an even number of channels, at most {d}")
    if style not in ("half", "interleaved"):
        raise bad("style", style, "'half' or 'interleaved'")
    if base <= 0:
        raise bad("base", base, "a positive number")
    compute = accumulation_dtype(x.dtype)
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    lengths = zip(reversed(positions.shape), reversed(x.shape[:-1]), strict=False)
    if positions.ndim > x.ndim - 1 or not all(p in (1, n) for p, n in lengths):
        raise bad("positions", tuple(positions.shape), f"a shape that broadcasts to {tuple(x.shape[:-1])}")
    angles = positions.to(compute).unsqueeze(-1) * _frequencies(dims, base, compute, x.device)
    turned = rotate(x[..., :dims].to(compute), angles.cos(), angles.sin(), style).to(x.dtype)
    return turned if dims == d else torch.cat([turned, x[..., dims:]], dim=-1)


def axial_rotary(
    x: Float[Tensor, "*batch n d"],
    coords: Grid | Num[Tensor, "*#batch n axes"],
    *,
    base: float = 10000.0,
    style: Style = "half",
) -> Float[Tensor, "*batch n d"]:
    """Rotate one block of channels per axis of a grid, D / axes channels each, by that axis' coordinate.

    Args:
        x: queries or keys with one row per token.
        coords: a Grid, or coordinates (integers or floats, e.g. normalised) with one last entry per axis.
        base: as in `rotary`, within each block.
        style: as in `rotary`, within each block.

    Raises:
        ArgumentError: if D is not a multiple of twice the number of axes, or the grid has not N tokens.
    """
    if isinstance(coords, Grid):
        coords.check_tokens(x.shape[-2], "x")
        coords = coords.coords(device=x.device)
    axes, d = coords.shape[-1], x.shape[-1]
    if axes == 0 or d % (2 * axes):
        raise bad("x", tuple(x.shape), f"a head size that is a multiple of {2 * axes} for {axes} axes")
    blocks = x.split(d // axes, dim=-1)
    turned = [rotary(b, coords[..., a], base=base, style=style) for a, b in enumerate(blocks)]
    return torch.cat(turned, dim=-1)


def axial_angles(
    coords: Grid | Num[Tensor, "*batch n axes"],
    d: int,
    *,
    base: float = 10000.0,
    inclusive: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "*batch n half"]:
    """Return the angles `axial_rotary` turns the pairs of D channels by, for `rotate` with any style.

    One call serves queries and keys, and all layers on one map.

    Args:
        coords: as in `axial_rotary`.
        d: channels D of a head.
        base: as in `rotary`, within each block.
        inclusive: spread the frequencies of a block evenly from 1 to exactly 1 / base, both included
            (RMT, RALA), instead of stopping one step before it.
        dtype: of the angles.
        device: of the angles, for a Grid.

    Raises:
        ArgumentError: naming `d`, if it is not a multiple of twice the number of axes.
    """
    if isinstance(coords, Grid):
        coords = coords.coords(device=device)
    axes = coords.shape[-1]
    if axes == 0 or d < 0 or d % (2 * axes):
        raise bad("d", d, f"a head size that is a multiple of {2 * axes} for {axes} axes")
    pairs = d // (2 * axes)
    if inclusive and pairs > 1:
        base = base ** (pairs / (pairs - 1))
    frequencies = _frequencies(2 * pairs, base, dtype, coords.device)
    return (coords.to(dtype).unsqueeze(-1) * frequencies).flatten(-2)


def multimodal_rotary(
    x: Float[Tensor, "*batch n d"],
    positions: Num[Tensor, "*#batch n axes"],
    *,
    sections: Sequence[int],
    base: float = 10000.0,
    style: Style = "half",
    interleave: bool = False,
) -> Float[Tensor, "*batch n d"]:
    """Rotate each channel pair by one of several positions (time, height, width): M-RoPE (arXiv 2409.12191).

    Frequencies fall over the whole head as in `rotary`; `sections` says which pairs turn with which position. Text
    has the same number on all axes, and is rotated as by `rotary`.

    Args:
        x: queries or keys with one row per token.
        positions: integers or floats, one last entry per axis.
        sections: channel pairs of each axis; they add up to D / 2.
        base, style: as in `rotary`.
        interleave: deal the pairs out in turn, axis 0, 1, 2, 0, ..., until an axis has its share and axis 0 takes
            the rest (Qwen3-VL), instead of one block after the other. Axes other than 0 need shares that fit.

    Raises:
        ArgumentError: naming `sections` or `positions`.
    """
    axes, half = positions.shape[-1], x.shape[-1] // 2
    if len(sections) != axes or sum(sections) != half or x.shape[-1] % 2 or min(sections, default=0) < 0:
        raise bad("sections", tuple(sections), f"{axes} counts of channel pairs that add up to {half}")
    axis = torch.repeat_interleave(torch.arange(axes), torch.tensor(tuple(sections)))
    if interleave:
        axis = torch.zeros(half, dtype=torch.long)
        for a in range(1, axes):
            stop = a + axes * (sections[a] - 1)
            if sections[a] and stop >= half:
                raise bad(
                    "sections", tuple(sections), f"at most {(half - 1 - a) // axes + 1} pairs for axis {a}"
                )
            axis[a : axes * sections[a] : axes] = a
    lengths = zip(reversed(positions.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if positions.ndim > x.ndim or not all(p in (1, n) for p, n in lengths):
        raise bad("positions", tuple(positions.shape), f"{(*x.shape[:-1], axes)}, or what broadcasts to it")
    compute = accumulation_dtype(x.dtype)
    turns = positions.to(compute).index_select(-1, axis.to(x.device))
    angles = turns * _frequencies(2 * half, base, compute, x.device)
    return rotate(x.to(compute), angles.cos(), angles.sin(), style).to(x.dtype)


def rotate(
    x: Float[Tensor, "*batch n d"],
    cos: Float[Tensor, "*#batch n half"],
    sin: Float[Tensor, "*#batch n half"],
    style: Style = "half",
) -> Float[Tensor, "*batch n d"]:
    """Rotate channel pairs by angles given as cosines and sines, one per pair (stretched or learned ones, say)."""
    if style == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _frequencies(dims: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = torch.arange(0, dims, 2, dtype=dtype, device=device) / max(dims, 1)
    return base**-exponents
