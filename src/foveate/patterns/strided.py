"""`Strided`: tokens at the same phase of a stride see one another, over the whole grid."""

from __future__ import annotations

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import LocalAxis
from foveate.patterns.grids import GridLike, GridPattern, PerAxis


class Strided(GridPattern):
    """Tokens whose coordinates agree modulo `stride` on every axis attend to one another.

    Stride 1 on an axis sees all of it, a stride as long as the axis none but its own place. Where strides divide
    the axes it is `Lattice(grid, axis / stride)`; here any size fits, groups then differ by a token.

    Args:
        grid: token geometry.
        stride: one integer or one per axis, >= 1.

    Raises:
        ArgumentError: naming `stride`.
    """

    fields = ("grid", "stride")
    stride: tuple[int, ...]

    def __init__(self, grid: GridLike, stride: PerAxis):
        grid = Grid.of(grid)
        strides = grid.per_axis(stride, "stride")
        if min(strides) < 1:
            raise bad("stride", stride, "integers >= 1")
        local = []
        for length, step in zip(grid, strides, strict=True):
            members = -(-length // step)
            local.append(LocalAxis(members, 0, group=members, dilation=step))
        self._store(grid=grid, stride=strides, local=tuple(local))
