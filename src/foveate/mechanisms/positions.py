"""Positions that several systems share: a learned bias per head and offset, and turns of neighbouring channels."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.grid import Grid
from foveate.scores.relative import RelativeTable
from foveate.scores.rotary import axial_angles, rotate


class RelativeBias(nn.Module):
    """A table (heads, 2*w0 - 1, 2*w1 - 1, ...) over the offsets inside a window, added to the logits.

    Args:
        heads: number of heads.
        window: window size per axis.
        sign: which offset indexes the table, "key-query" or "query-key"; offset 0 is the middle entry.
        step: offsets are counted in steps of this many tokens, per axis (dilation).
    """

    def __init__(
        self,
        heads: int,
        window: Sequence[int],
        *,
        sign: Literal["key-query", "query-key"] = "key-query",
        step: int | Sequence[int] = 1,
    ):
        super().__init__()
        self.heads, self.window, self.step = heads, tuple(window), step
        self.sign: Literal["key-query", "query-key"] = sign
        self.table = nn.Parameter(torch.empty(heads, *(2 * w - 1 for w in self.window)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a truncated normal with standard deviation 0.02, as the papers do."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> RelativeTable:
        """Return the score for tokens on `grid`."""
        table: Tensor = self.table
        return RelativeTable(table, grid, sign=self.sign, step=self.step)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"heads={self.heads}, window={self.window}, sign={self.sign!r}, step={self.step}"


Turns = tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]


def map_turns(grid: Grid, width: int, like: Tensor) -> Turns:
    """Return cosines and sines for `turned`: axial rotary positions of a head, as RMT and its successors have them.

    An equal share of channels turns with every axis, by frequencies from 1 to 1 / 10000, both included.

    Args:
        grid: the map.
        width: channels of a head; a multiple of twice the number of axes.
        like: gives dtype (widened to float32) and device.
    """
    wide = accumulation_dtype(like.dtype)
    angles = axial_angles(grid, width, inclusive=True, dtype=wide, device=like.device)
    return angles.cos(), angles.sin()


def turned(x: Float[Tensor, "b h n d"], turns: Turns | None) -> Float[Tensor, "b h n d"]:
    """Turn neighbouring channels of queries or keys, in float32 or wider; None leaves them."""
    if turns is None:
        return x
    return rotate(x.to(turns[0].dtype), *turns, "interleaved").to(x.dtype)
