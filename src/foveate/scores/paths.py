"""Decay along paths with one corner on a 2-d grid: what is lost on the way from a query to a key, from the data.

Every cell has two log factors: one paid on stepping onto (or off) it along its row, one along its column. A step
between neighbours costs the factor of the right (or lower) of the two, in either direction, so that the way there
and the way back along one line cost the same. A path goes along the query's row and then down the key's column, or
the other way round; its log factor is the sum over its steps, which is a difference of cumulative sums per line:

    rows[y][x, x'] = sum of across[y, min(x, x') + 1 .. max(x, x')]         columns[x][y, y'] likewise, of down
    first="row":    rows[y_q][x_q, x_k] + columns[x_k][y_q, y_k]            the corner is (y_q, x_k)
    first="column": columns[x_q][y_q, y_k] + rows[y_k][x_q, x_k]            the corner is (y_k, x_q); the transpose

Each term reads one row of N numbers by a coordinate, so that a path is two `Gathered` scores over N (H + W) numbers
per head instead of N^2 (arXiv 2506.15940). `kernels/paths.py` applies the same factors to values without any pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.scores.base import Chain
from foveate.scores.bias import Coords, Gathered

First = Literal["row", "column"]


def line_sums(log_decay: Float[Tensor, "b h n"], grid: Grid, axis: int) -> Float[Tensor, "b h n size"]:
    """Return for each token the log factor from it to every cell of its line along `axis`.

    Args:
        log_decay: one finite number per token, usually negative.
        grid: 2-d geometry of the tokens.
        axis: 1 sums along rows (size = columns of the grid), 0 along columns (size = rows).

    Returns:
        out[..., i, j] = sum of `log_decay` over the cells after the first and up to the last of i and j, in
        float32 or wider; 0 for a token's own cell.

    Raises:
        ArgumentError: naming `log_decay`, `grid` or `axis`.
    """
    check_decay("log_decay", log_decay, grid)
    if axis not in (0, 1):
        raise bad("axis", axis, "1 (along rows) or 0 (along columns)")
    lines = log_decay.to(accumulation_dtype(log_decay.dtype)).unflatten(-1, grid.sizes)
    lines = lines if axis == 1 else lines.transpose(-2, -1)
    sums = lines.cumsum(-1)
    at = torch.arange(sums.shape[-1], device=sums.device)
    # The sign is that of the positions: an absolute value would have no gradient where nothing decays.
    sign = (at[:, None] - at).sign().to(sums.dtype)
    between = (sums[..., :, None] - sums[..., None, :]) * sign
    between = between if axis == 1 else between.transpose(2, 3)
    return between.flatten(2, 3)


def path_decay(
    across: Float[Tensor, "b h n size"],
    down: Float[Tensor, "b h n size"],
    grid: Grid,
    *,
    first: First = "row",
) -> Chain:
    """Return the score of paths with one corner.

    Args:
        across: `line_sums(..., axis=1)`, what is lost along rows.
        down: `line_sums(..., axis=0)`, what is lost along columns.
        grid: 2-d geometry of queries and keys.
        first: whether the path starts from the query along its row or along its column.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    if first not in ("row", "column"):
        raise bad("first", first, "'row' or 'column'")
    if first == "row":
        return Chain((row_decay(across, grid), Gathered(down, _query_row, side="key", grid=grid)))
    return Chain((column_decay(down, grid), Gathered(across, _query_column, side="key", grid=grid)))


def row_decay(across: Float[Tensor, "b h n size"], grid: Grid) -> Gathered:
    """Return the score of going along the query's row to the key's column."""
    return Gathered(across, _key_column, grid=grid)


def column_decay(down: Float[Tensor, "b h n size"], grid: Grid) -> Gathered:
    """Return the score of going along the query's column to the key's row."""
    return Gathered(down, _key_row, grid=grid)


def check_decay(name: str, log_decay: Tensor, grid: Grid) -> None:
    """Raise an ArgumentError unless there is one number per batch, head and token of a 2-d grid."""
    if not isinstance(grid, Grid) or grid.ndim != 2:
        raise bad("grid", grid, "a Grid with 2 axes")
    if log_decay.ndim != 3 or log_decay.shape[2] != grid.numel or not log_decay.is_floating_point():
        expected = f"floats (B, H, {grid.numel}), one per token of {grid}"
        raise bad(name, f"{log_decay.dtype} {tuple(log_decay.shape)}", expected)


# Named functions, so that scores print readably and backends that prove them linear do so once.
def _key_column(q: Coords, k: Coords) -> Tensor:
    return k[1]


def _key_row(q: Coords, k: Coords) -> Tensor:
    return k[0]


def _query_row(q: Coords, k: Coords) -> Tensor:
    return q[0]


def _query_column(q: Coords, k: Coords) -> Tensor:
    return q[1]
