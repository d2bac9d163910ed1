"""`RelativeTable`: a learned bias per relative offset on an N-d grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.scores.base import Additive, Extent, need_float
from foveate.scores.pairs import Pairs

Sign = Literal["key-query", "query-key"]


@dataclass(frozen=True, eq=False, repr=False)
class RelativeTable(Additive):
    """Add `table[h, o_0 + m_0, ..., o_a + m_a]`, where o is the offset of a pair in steps, axis by axis.

    With sign="key-query", o = (key coordinate - query coordinate) / step; "query-key" is its negative. The
    middle of the table is offset 0. A pair whose offset the table does not reach, or that is not a whole
    number of steps, gets no bias (0); with `clip=True` it gets the nearest entry. Nothing of size N x N is
    stored, and the gradient of the table sums over all pairs that read an entry.

    Swin indexes query-key; neighborhood attention key-query, in steps of its dilation.

    Args:
        table: float `(H or 1, 2 m_0 + 1, ..., 2 m_a + 1)`, one dimension per grid axis, every one odd.
        grid: geometry of the keys, and of the queries too unless `query_grid` is given.
        sign: which way offsets count.
        step: one integer, or one per axis (a dilation).
        clip: whether offsets beyond the table read its border.
        query_grid: another grid for the queries; coordinates of both start at 0.
        lead: tokens before the grid (class tokens, registers), on both sides; their pairs get no bias.
    """

    table: Tensor
    grid: Grid
    sign: Sign = "key-query"
    step: int | Sequence[int] = 1
    clip: bool = False
    query_grid: Grid | None = None
    lead: int = 0

    def __post_init__(self):
        need_float(self, "table", self.table)
        if not isinstance(self.grid, Grid):
            raise bad("RelativeTable.grid", self.grid, "a Grid")
        if self.sign not in ("key-query", "query-key"):
            raise bad("RelativeTable.sign", self.sign, "'key-query' or 'query-key'")
        sizes = tuple(self.table.shape[1:])
        if len(sizes) != self.grid.ndim or any(s % 2 == 0 for s in sizes):
            hint = "Offsets -m..m take 2 m + 1 entries."
            expected = f"(heads, then {self.grid.ndim} odd sizes) for {self.grid}"
            raise bad("RelativeTable.table", tuple(self.table.shape), expected, hint)
        step = self.grid.per_axis(self.step, "RelativeTable.step")
        if min(step) < 1:
            raise bad("RelativeTable.step", self.step, "positive integers")
        if self.lead < 0:
            raise bad("RelativeTable.lead", self.lead, "a count of tokens")
        if self.query_grid is not None and self.query_grid.ndim != self.grid.ndim:
            raise bad("RelativeTable.query_grid", self.query_grid, f"{self.grid.ndim} axes, as the grid has")

    def check(self, extent: Extent) -> None:
        """Raise unless the grids have N_q and N_k tokens and the table has 1 or H heads."""
        (self.query_grid or self.grid).check_tokens(extent.n_q - self.lead, "N_q")
        self.grid.check_tokens(extent.n_k - self.lead, "N_k")
        if self.table.shape[0] not in (1, extent.heads):
            raise bad("RelativeTable.table", tuple(self.table.shape), f"1 or {extent.heads} heads in front")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the table's entries at the pairs."""
        index, inside = self._index(at)
        flat = self.table.reshape(self.table.shape[0], -1)
        if index.shape[0] == 1 and index.shape[1] == 1:
            found = flat.index_select(1, index.reshape(-1)).reshape(1, flat.shape[0], *index.shape[2:])
        else:
            heads = torch.arange(flat.shape[0], device=flat.device).reshape(-1, *([1] * (index.ndim - 2)))
            found = flat[heads, index]
        return found if inside is None else found * inside.to(found.dtype)

    def _index(self, at: Pairs) -> tuple[Int[Tensor, "b h *cells tq tk"], Bool[Tensor, "..."] | None]:
        """Return flat table indices, always in range, and which of them count (None = all)."""
        index, inside = None, None
        flip = -1 if self.sign == "query-key" else 1
        query_grid = self.query_grid or self.grid
        offsets = at.offsets(self.grid, query_grid, self.lead)
        steps = self.grid.per_axis(self.step, "step")
        for axis, (offset, step, size) in enumerate(zip(offsets, steps, self.table.shape[1:], strict=True)):
            m = size // 2
            ok = None
            if step > 1:
                if not self.clip:
                    ok = offset % step == 0
                offset = torch.div(offset, step, rounding_mode="floor")
            offset = offset * flip
            reach = max(self.grid[axis], query_grid[axis]) - 1
            if at.frame is not None or reach > m * step or self.lead:
                if not self.clip:
                    near = offset.abs() <= m
                    ok = near if ok is None else ok & near
                offset = offset.clamp(-m, m)
            inside = ok if inside is None else inside if ok is None else inside & ok
            index = offset + m if index is None else index * size + (offset + m)
        if self.lead:
            grid_pairs = (at.q >= self.lead)[..., :, None] & (at.k >= self.lead)[..., None, :]
            inside = grid_pairs if inside is None else inside & grid_pairs
        assert index is not None
        return index, inside
