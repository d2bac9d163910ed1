"""Blocks of a sequence: pooled content, which key blocks a query block takes, and the Selection of that.

Everything here is as large as blocks x blocks; tokens appear in `select_blocks` alone, as ids of what was taken.
A sequence of N tokens has ceil(N / size) blocks; the last one is shorter where `size` does not divide N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import bad
from foveate.patterns.cells import Cells, cells_of
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection

Pooling = Literal["avg", "max", "min"]

_POOLINGS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # What fills the short last block, and what is taken of each block.
    "avg": (0.0, lambda x: x.sum(-2)),
    "max": (float("-inf"), lambda x: x.amax(-2)),
    "min": (float("inf"), lambda x: x.amin(-2)),
}


def block_count(n: int, size: int) -> int:
    """Return how many blocks of `size` tokens `n` tokens make.

    Raises:
        ArgumentError: naming `n` or `size`, unless they are integers >= 0 and >= 1.
    """
    return -(-check_int(n, "n", 0) // check_int(size, "size", 1))


def pool_blocks(
    x: Float[Tensor, "*batch n d"], size: int, how: Pooling = "avg"
) -> Float[Tensor, "*batch blocks d"]:
    """Return the average, maximum or minimum of every block along N; a short last block counts what it has.

    Raises:
        ArgumentError: naming `how` or `size`.
    """
    if how not in _POOLINGS:
        raise bad("how", how, f"one of {sorted(_POOLINGS)}")
    n, (fill, take) = x.shape[-2], _POOLINGS[how]
    blocks = block_count(n, size)
    pooled = take(functional.pad(x, (0, 0, 0, blocks * size - n), value=fill).unflatten(-2, (blocks, size)))
    return pooled / block_sizes(n, size, x.device).to(x.dtype)[:, None] if how == "avg" else pooled


def block_sizes(n: int, size: int, device: torch.device | None = None) -> Int[Tensor, "blocks"]:
    """Return how many tokens every block has."""
    starts = torch.arange(block_count(n, size), device=device) * size
    return (n - starts).clamp(max=size)


def causal_blocks(
    n_q: int, n_k: int, block_q: int, block_k: int, *, whole: bool = False, device: torch.device | None = None
) -> Bool[Tensor, "q_blocks k_blocks"]:
    """Say which key blocks lie in the past of which query blocks. Query i stands at key n_k - n_q + i.

    Args:
        n_q, n_k: numbers of tokens.
        block_q, block_k: tokens per block.
        whole: only key blocks of which every query sees every key, instead of those with any visible pair.
        device: of the result.
    """
    first_q = torch.arange(block_count(n_q, block_q), device=device) * block_q
    first_k = torch.arange(block_count(n_k, block_k), device=device) * block_k
    if whole:
        # A short last block counts as whole: queries beyond it see all it has.
        last_k = (first_k + block_k - 1).clamp(max=n_k - 1)
        return last_k <= (first_q + n_k - n_q)[:, None]
    last_q = (first_q + block_q - 1).clamp(max=n_q - 1)
    return first_k <= (last_q + n_k - n_q)[:, None]


def choose_top(
    scores: Num[Tensor, "*batch k_blocks"], k: int, allowed: Bool[Tensor, "..."] | None = None
) -> Bool[Tensor, "*batch k_blocks"]:
    """Choose the `k` best blocks of every row; all where there are no more. Ties go to either.

    Args:
        scores: how much each block is wanted.
        k: how many.
        allowed: blocks that may be chosen at all; rows with fewer of them choose fewer.

    Raises:
        ArgumentError: naming `k`, unless it is an integer >= 1.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    k = min(check_int(k, "k", 1), scores.shape[-1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(k, dim=-1).indices, True)
    return chosen if allowed is None else chosen & allowed


def straight_through(
    probabilities: Float[Tensor, "*batch k_blocks"], chosen: Bool[Tensor, "*batch k_blocks"]
) -> Float[Tensor, "*batch k_blocks"]:
    """Return a gate that is exactly 1 at chosen blocks and 0 elsewhere, with the gradient of `probabilities`.

    The gradient reaches all blocks, so that one that was not chosen can become it. Multiply what a block
    contributes by the gate.
    """
    return chosen.to(probabilities.dtype) + (probabilities - probabilities.detach())


def mass_counts(
    weights: Float[Tensor, "*batch k_blocks"], mass: float
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch k_blocks"]]:
    """Return how many of the largest weights of a row make up `mass` of its sum, and their order.

    Rows of zeros need none.

    Raises:
        ArgumentError: naming `mass`, unless 0 <= mass <= 1.
    """
    if not 0 <= mass <= 1:
        raise bad("mass", mass, "a share between 0 and 1")
    line, order = weights.sort(dim=-1, descending=True, stable=True)
    total = line.sum(-1, keepdim=True)
    before = line.cumsum(-1) - line
    # A weight is needed while those before it do not make up the mass; of 1 the rounding never takes one away.
    needed = (before < mass * total) if mass < 1 else line > 0
    return needed.sum(-1), order


def choose_mass(
    weights: Float[Tensor, "*batch k_blocks"], mass: float, allowed: Bool[Tensor, "..."] | None = None
) -> Bool[Tensor, "*batch k_blocks"]:
    """Choose the fewest blocks of a row whose weights (>= 0) make up `mass` of the row's sum ("top-cdf").

    Args:
        weights: shares or anything proportional to them.
        mass: 1 takes everything that has a weight at all.
        allowed: blocks that may be chosen at all; others count as weight 0.

    Raises:
        ArgumentError: naming `mass`.
    """
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    count, order = mass_counts(weights, mass)
    best = torch.arange(weights.shape[-1], device=weights.device) < count[..., None]
    return torch.empty_like(best).scatter_(-1, order, best)


def choose_above(
    scores: Num[Tensor, "*batch k_blocks"], threshold: float, allowed: Bool[Tensor, "..."] | None = None
) -> Bool[Tensor, "*batch k_blocks"]:
    """Choose all blocks that score above `threshold`."""
    chosen = scores > threshold
    return chosen if allowed is None else chosen & allowed


def rank_levels(
    scores: Num[Tensor, "*batch k_blocks"],
    ends: Sequence[int] | Int[Tensor, "*batch levels"],
    levels: Sequence[int],
    allowed: Bool[Tensor, "..."] | None = None,
) -> Int[Tensor, "*batch k_blocks"]:
    """Give every block the level of its rank in the row: `levels[i]` to ranks `ends[i-1] .. ends[i] - 1`.

    Args:
        scores: how much each block is wanted; the best one has rank 0, ties keep the order of blocks.
        ends: ascending numbers of blocks, the same for all rows or one set per row (as `mass_counts` gives).
        levels: one integer per end; blocks beyond the last end get 0.
        allowed: blocks that may have a level at all.

    Raises:
        ArgumentError: naming `ends`, unless there is one per level.
    """
    bounds = ends if isinstance(ends, Tensor) else torch.tensor(list(ends), dtype=torch.long)
    bounds = bounds.to(scores.device)
    if bounds.shape[-1] != len(levels):
        raise bad("ends", bounds.shape[-1], f"{len(levels)}, one per level")
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    step = (rank[:, None] >= bounds[..., None, :]).sum(-1)  # (*batch or (), k_blocks)
    table = torch.tensor([*levels, 0], device=scores.device)
    given = torch.empty_like(order).scatter_(-1, order, table[step].expand(order.shape))
    return given if allowed is None else given.masked_fill(~allowed, 0)


def select_blocks(
    chosen: Bool[Tensor, "b h q_blocks k_blocks"] | Int[Tensor, "b h q_blocks m"],
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    *,
    causal: bool = False,
    positions: tuple[Int[Tensor, "n_q"], Int[Tensor, "n_k"]] | None = None,
    rows: int = 1,
) -> Selection:
    """Return the selection in which the tokens of a query block attend to the tokens of its chosen key blocks.

    One cell per query block. From a boolean table, rows are sorted by how many blocks they take and those that
    take about as many share a shape, so that a few full rows do not widen all others. Ids give one shape and
    never wait for the device.

    Args:
        chosen: True at chosen blocks, or the chosen blocks' ids, each once, -1 for none. B and H may be 1.
        block_q, block_k: tokens per block; the last blocks may be shorter.
        n_q, n_k: numbers of tokens.
        causal: take away keys after the query's own position; blocks wholly behind it need not be left out.
        positions: of queries and keys in `causal`, where they are not the usual ones (query i at
            n_k - n_q + i); pooled keys, for instance, stand where their last token does.
        rows: query blocks per cell, which then holds all blocks that one of them takes, and a mask. Worth it
            where blocks of queries are so small (down to one token) that kernels could not fill their lanes.

    Raises:
        ArgumentError: naming `chosen` when its shape does not fit, or a length or size.
    """
    nq, nk = block_count(n_q, block_q), block_count(n_k, block_k)
    check_int(rows, "rows", 1)
    ids = chosen.dtype != torch.bool
    fits = chosen.ndim == 4 and chosen.shape[2] == nq and (ids or chosen.shape[3] == nk)
    if not fits or (ids and chosen.dtype != torch.int64):
        what = f"booleans (B, H, {nq}, {nk}), or int64 ids (B, H, {nq}, any)"
        raise bad("chosen", f"{chosen.dtype} of shape {tuple(chosen.shape)}", what)
    maker = _Maker(chosen.device, block_q, block_k, n_q, n_k, rows, causal, positions)
    if ids and rows == 1:
        numbers = torch.arange(nq, device=chosen.device).expand(1, 1, nq)
        return Selection.of_cells([maker.cells(numbers, chosen, None)], n_q, n_k)
    if ids:
        table = chosen.new_zeros(*chosen.shape[:3], nk + 1, dtype=torch.bool)
        chosen = table.scatter_(-1, torch.where(chosen < 0, nk, chosen), True)[..., :nk]
    return Selection.of_cells(_ragged(chosen, maker), n_q, n_k)


class _Maker:
    """Makes cells of rows and their blocks."""

    def __init__(
        self,
        device: torch.device,
        block_q: int,
        block_k: int,
        n_q: int,
        n_k: int,
        rows: int,
        causal: bool,
        positions: tuple[Tensor, Tensor] | None,
    ):
        self.block_q, self.block_k, self.n_q, self.n_k, self.rows = block_q, block_k, n_q, n_k, rows
        self.causal, self.usual, self.device = causal, positions is None, device
        if positions is None:
            positions = torch.arange(n_k - n_q, n_k, device=device), torch.arange(n_k, device=device)
        self.q_at, self.k_at = (p.to(device) for p in positions)

    def visible(self) -> Bool[Tensor, "q_blocks k_blocks"] | None:
        """Say which blocks have a visible pair, where that is known without looking at tokens."""
        if not self.causal or not self.usual:
            return None
        return causal_blocks(self.n_q, self.n_k, self.block_q, self.block_k, device=self.device)

    def cells(self, row: Int[Tensor, "b h c"], blocks: Int[Tensor, "b h c w"], table: Tensor | None) -> Cells:
        """Make cells.

        Args:
            row: number of each cell, `rows` query blocks each.
            blocks: its key blocks, -1 for none.
            table: (b, h, c, rows, w) which of its query blocks takes which, None where they all do.
        """
        q_ids = _tokens(row[..., None], self.rows * self.block_q, self.n_q)
        k_ids = _tokens(blocks, self.block_k, self.n_k)
        mask = None
        if table is not None:
            mask = table.repeat_interleave(self.block_q, 3).repeat_interleave(self.block_k, 4)
        if self.causal:
            q_at = self.q_at[q_ids.clamp(min=0)] if self.n_q else q_ids
            k_at = self.k_at[k_ids.clamp(min=0)] if self.n_k else k_ids
            past = k_at[..., None, :] <= q_at[..., :, None]
            mask = past if mask is None else mask & past
        return cells_of(q_ids, k_ids, mask)


def _tokens(blocks: Int[Tensor, "*lead w"], size: int, n: int) -> Int[Tensor, "*lead t"]:
    """Return the token ids of blocks, -1 for absent blocks and beyond the end."""
    ids = blocks[..., None] * size + torch.arange(size, device=blocks.device)
    return torch.where((blocks[..., None] >= 0) & (ids < n), ids, -1).flatten(-2)


def _ragged(chosen: Bool[Tensor, "b h nq nk"], maker: _Maker) -> list[Cells]:
    """Return cells of a table, rows that take about as many blocks in one shape."""
    visible = maker.visible()
    chosen = chosen if visible is None else chosen & visible
    b, h, nq, nk = chosen.shape
    table = functional.pad(chosen, (0, 0, 0, -nq % maker.rows)).unflatten(2, (-1, maker.rows))
    taken = table.any(3)  # (b, h, r, nk)
    count = taken.sum(-1)
    order = count.argsort(dim=-1, descending=True, stable=True)
    # Most blocks that a row at this place of the order takes, in any batch element and head.
    most = count.gather(-1, order).flatten(0, 1).amax(0).tolist() if b * h else []
    front = (~taken).to(torch.uint8).argsort(dim=-1, stable=True)
    cells, first = [], 0
    while first < len(most) and most[first] > 0:
        width, last = most[first], first
        while last < len(most) and 3 * most[last] > 2 * width:
            last += 1
        row = order[:, :, first:last]
        at = row[..., None].expand(-1, -1, -1, width)
        blocks = front[..., :width].gather(2, at)
        there = torch.arange(width, device=row.device) < count.gather(-1, row)[..., None]
        kept = None
        if maker.rows > 1:
            rows = row[..., None, None].expand(-1, -1, -1, maker.rows, nk)
            columns = blocks[..., None, :].expand(-1, -1, -1, maker.rows, -1)
            kept = table.gather(2, rows).gather(4, columns)
        cells.append(maker.cells(row, torch.where(there, blocks, -1), kept))
        first = last
    nothing = torch.full((b, h, 1, 1), -1, device=chosen.device)
    return cells or [Cells(nothing, nothing)]
