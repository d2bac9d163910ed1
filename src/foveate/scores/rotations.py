"""Rotary embeddings as values: `Rotary`, `AxialRotary`, `MultimodalRotary`. They print, draw and compose as scores do.

A rotation turns queries and keys alike before `attend`: `attend(turn(q), turn(k), v)`. `a + b` turns by a, then by b
(angles add).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Num
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.scores.base import Part
from foveate.scores.rotary import Style, axial_rotary, multimodal_rotary, rotary


class Rotation(Part):
    """What turns queries or keys by their positions."""

    def __call__(
        self, x: Float[Tensor, "*batch n d"], positions: Num[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch n d"]:
        """Return `x` turned; `positions` are those of its rows, counted from 0 when left out."""
        raise NotImplementedError

    def __add__(self, other: Rotation) -> Rotation:
        if not isinstance(other, Rotation):
            return NotImplemented
        return _Turns((*_flat(self), *_flat(other)))


@dataclass(frozen=True, repr=False)
class Rotary(Rotation):
    """`rotary` with its options: positions on one axis, `(*batch, N)`.

    Args:
        base, style, dims: as in `rotary`.
    """

    base: float = 10000.0
    style: Style = "half"
    dims: int | None = None

    def __call__(
        self, x: Float[Tensor, "*batch n d"], positions: Num[Tensor, "*#batch n"] | None = None
    ) -> Float[Tensor, "*batch n d"]:
        """Return `x` turned."""
        return rotary(x, positions, base=self.base, style=self.style, dims=self.dims)


@dataclass(frozen=True, repr=False)
class AxialRotary(Rotation):
    """`axial_rotary` with its options: one block of channels per axis of a grid.

    Args:
        grid: where rows stand when no positions are given.
        base, style: as in `rotary`, within each block.
    """

    grid: Grid
    base: float = 10000.0
    style: Style = "half"

    def __call__(
        self, x: Float[Tensor, "*batch n d"], positions: Num[Tensor, "*#batch n axes"] | None = None
    ) -> Float[Tensor, "*batch n d"]:
        """Return `x` turned."""
        coords = self.grid if positions is None else positions
        return axial_rotary(x, coords, base=self.base, style=self.style)


@dataclass(frozen=True, repr=False)
class MultimodalRotary(Rotation):
    """`multimodal_rotary` with its options: each section of the head turns with one of several positions.

    Args:
        sections, base, style, interleave: as in `multimodal_rotary`.
    """

    sections: tuple[int, ...]
    base: float = 10000.0
    style: Style = "half"
    interleave: bool = False

    def __call__(
        self, x: Float[Tensor, "*batch n d"], positions: Num[Tensor, "*#batch n axes"] | None = None
    ) -> Float[Tensor, "*batch n d"]:
        """Return `x` turned.

        Raises:
            ArgumentError: naming `positions`, when there are none: tokens of several kinds are not counted.
        """
        if positions is None:
            raise bad("positions", None, f"positions (..., N, {len(self.sections)}), one per axis")
        return multimodal_rotary(
            x, positions, sections=self.sections, base=self.base, style=self.style, interleave=self.interleave
        )


@dataclass(frozen=True, repr=False)
class _Turns(Rotation):
    parts: tuple[Rotation, ...]

    def __call__(
        self, x: Float[Tensor, "*batch n d"], positions: Num[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch n d"]:
        """Return `x` turned by every part."""
        for part in self.parts:
            x = part(x, positions)
        return x

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def _flat(rotation: Rotation) -> tuple[Rotation, ...]:
    return rotation.parts if isinstance(rotation, _Turns) else (rotation,)
