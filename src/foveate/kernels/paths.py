"""Path decay without pairs: the factors of `scores/paths.py` applied to values by one scan per axis.

The N x N matrix of a path with one corner, exp(score), is a product of two sparse ones: the second stretch of the
path acts inside lines of one axis, the first inside lines of the other. Each of these is a two-sided decayed sum
along a line, which a scan computes in one pass, so that N^2 products become 2 N of them (arXiv 2506.15940).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.kernels.scan.api import scan
from foveate.scores.paths import First, check_decay


def path_product(
    x: Float[Tensor, "b h n e"],
    across: Float[Tensor, "b h n"],
    down: Float[Tensor, "b h n"],
    grid: Grid,
    *,
    first: First = "row",
) -> Float[Tensor, "b h n e"]:
    """Return exp(score) @ x, where score is `path_decay` over the lines of `across` and `down`.

    out[q] = sum over all keys k of (the product of the factors along the path from q to k) x[k]. The second
    stretch of a path comes first: values are gathered at the corners, then from the corners at the queries.

    Args:
        x: one row of E numbers per token.
        across: log factor of each cell along its row, not positive.
        down: log factor of each cell along its column, not positive.
        grid: 2-d geometry of the tokens.
        first: whether the path starts from the query along its row or along its column.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    check_decay("across", across, grid)
    check_decay("down", down, grid)
    if x.ndim != 4 or x.shape[:3] != across.shape or x.shape[:3] != down.shape:
        raise bad(
            "x", tuple(x.shape), f"(B, H, N, E) with the (B, H, N) = {tuple(across.shape)} of the factors"
        )
    if first == "row":
        return _along_rows(_along_columns(x, down, grid), across, grid)
    if first == "column":
        return _along_columns(_along_rows(x, across, grid), down, grid)
    raise bad("first", first, "'row' or 'column'")


def path_linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    across: Float[Tensor, "b h n"],
    down: Float[Tensor, "b h n"],
    grid: Grid,
    *,
    first: First = "row",
    scale: float = 1.0,
) -> Float[Tensor, "b h n e"]:
    """Return (exp(score) * (q k^T) * scale) v, elementwise products, without any N x N matrix.

    The decays act on the D x E outer products of keys and values, as states of one matrix per token: memory and
    time O(N D E), below the N^2 of pairs once N exceeds D or so.

    Args:
        q, k: queries and keys, or features of them; nothing is normalised.
        v: values.
        across, down, grid, first: as in `path_product`.
        scale: factor on the products.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    if q.shape != k.shape or q.ndim != 4 or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise bad("q, k, v", shapes, "(B, H, N, D) twice and (B, H, N, E)")
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(3)
    states = path_product(states, across, down, grid, first=first)
    return scale * torch.einsum("bhnd,bhnde->bhne", q, states.unflatten(3, (q.shape[3], v.shape[3])))


def _along_rows(x: Tensor, decay: Tensor, grid: Grid) -> Tensor:
    """Decayed sums inside each row; rows are sequences of their own."""
    lines = _decayed(x.unflatten(2, grid.sizes).flatten(1, 2), decay.unflatten(2, grid.sizes).flatten(1, 2))
    return lines.unflatten(1, (-1, grid[0])).flatten(2, 3)


def _along_columns(x: Tensor, decay: Tensor, grid: Grid) -> Tensor:
    turned = x.unflatten(2, grid.sizes).transpose(2, 3).flatten(2, 3)
    decay = decay.unflatten(2, grid.sizes).transpose(2, 3).flatten(2, 3)
    out = _along_rows(turned, decay, Grid(grid[1], grid[0]))
    return out.unflatten(2, (grid[1], grid[0])).transpose(2, 3).flatten(2, 3)


def _decayed(x: Float[Tensor, "b l n e"], decay: Float[Tensor, "b l n"]) -> Float[Tensor, "b l n e"]:
    """Two-sided sums along the token axis in which a step costs the factor of its later cell, both ways.

    A scan from the end decays by the factor of the cell it arrives at; here it is that of the cell it leaves, so
    that the decays move up by one cell.
    """
    ones = torch.ones_like(x[..., :1])
    before = scan(ones, ones, x, decay=decay)
    leaving = torch.nn.functional.pad(decay[..., 1:], (0, 1))
    after = scan(ones, ones, x, decay=leaving, causal="reverse")
    # What comes from the right without the cell's own value: the decayed sum of the next cell.
    factors = decay[..., 1:, None].exp().to(x.dtype)
    return before + torch.nn.functional.pad(after[..., 1:, :] * factors, (0, 0, 0, 1))
