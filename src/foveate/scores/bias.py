"""Scores that add given numbers: one per pair, one per key, or one read from a row of the query or key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.scores.base import Additive, Extent, check_fits, lift, need_float
from foveate.scores.pairs import Pairs, take_pairs, take_rows

Coords = tuple[Int[Tensor, "..."], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Bias(Additive):
    """Add a map: `logit[b, h, q, k] + bias[b, h, q, k]`.

    Args:
        bias: float tensor broadcastable to (B, H, N_q, N_k), with gradient. Phantom keys get 0.
    """

    bias: Tensor

    def check(self, extent: Extent) -> None:
        """Raise unless the bias broadcasts to (B, H, N_q, N_k)."""
        need_float(self, "bias", self.bias)
        check_fits(self, "bias", self.bias.shape, tuple(extent), "(B, H, N_q, N_k)")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the bias at the pairs."""
        return take_pairs(lift(self.bias, 4), at)


@dataclass(frozen=True, eq=False, repr=False)
class KeyBias(Additive):
    """Add one number per key: how much the key draws attention whoever asks.

    Args:
        b: float tensor broadcastable to (B, H, N_k), with gradient. Phantom keys get 0.
    """

    b: Tensor

    def check(self, extent: Extent) -> None:
        """Raise unless `b` broadcasts to (B, H, N_k)."""
        need_float(self, "b", self.b)
        check_fits(self, "b", self.b.shape, (extent.batch, extent.heads, extent.n_k), "(B, H, N_k)")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells 1 tk"]:
        """Return the bias of each key."""
        b = lift(self.b, 3)
        if at.frame is not None and b.shape[2] > 1:
            b = at.frame.pad(b, dim=2)
        return take_rows(b, at.k).unsqueeze(-2)


@dataclass(frozen=True, eq=False, repr=False)
class Gathered(Additive):
    """Look a bias up in a row that belongs to the query: `bias[q, k] = U[b, h, q, f(q, k)]`.

    This carries every position term that is a product of the query (or the key) with a small table of
    embeddings: U is that product, and f says which row of the table a pair reads. With a grid, decomposed
    2-d terms are two Gathered scores, one per axis:

        rows = q @ table_y.T                                       # (B, H, N, 2 * H_grid - 1)
        Gathered(rows, lambda q, k: k[0] - q[0] + grid[0] - 1, grid=grid)

    Args:
        U: `(B or 1, H or 1, N_q, R)`, with gradient; with side="key" `(B or 1, H or 1, N_k, R)`.
        f: gets the coordinates of queries and of keys, each a tuple with one integer tensor per axis
            (query tensors end in (t_q, 1), key tensors in (1, t_k)), and returns indices 0 <= i < R that
            broadcast to (t_q, t_k), at pairs that may not attend too (see `clip`).
        side: whose row is read.
        grid: geometry of the tokens, None = positions on one axis.
        query_grid: another grid for the queries; coordinates of both start at 0, and phantom keys have theirs
            outside of the grid.
        clip: indices below 0 read entry 0, those from R on read entry R - 1. So f need not care about pairs
            that no query may attend, and stays a linear form of the coordinates, which fast backends ask for.
    """

    U: Tensor
    f: Callable[[Coords, Coords], Int[Tensor, "..."]]
    side: Literal["query", "key"] = "query"
    grid: Grid | None = None
    query_grid: Grid | None = None
    clip: bool = False

    def __post_init__(self):
        if self.side not in ("query", "key"):
            raise bad("Gathered.side", self.side, "'query' or 'key'")
        if not callable(self.f):
            raise bad("Gathered.f", self.f, "a function of query and key coordinates")

    def check(self, extent: Extent) -> None:
        """Raise unless U has one row per query (or key) and `query_grid` has N_q tokens."""
        need_float(self, "U", self.U)
        n, name = (extent.n_q, "N_q") if self.side == "query" else (extent.n_k, "N_k")
        if self.U.ndim != 4 or self.U.shape[2] != n or not self.U.shape[3]:
            raise bad("Gathered.U", tuple(self.U.shape), f"(B or 1, H or 1, {name} = {n}, R) with R >= 1")
        check_fits(self, "U", self.U.shape[:3], (extent.batch, extent.heads, n), f"(B, H, {name})")
        if self.query_grid is not None:
            self.query_grid.check_tokens(extent.n_q, "N_q")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the looked-up biases."""
        index = self.f(at.query_coords(self.query_grid or self.grid), at.key_coords(self.grid))
        if self.clip:
            index = index.clamp(0, self.U.shape[3] - 1)
        u, ids = self.U, at.q
        tq, tk = at.q.shape[-1], at.k.shape[-1]
        if self.side == "key":
            u, ids = (u if at.frame is None else at.frame.pad(u, dim=2)), at.k
        rows = u if at.dense else take_rows(u, ids)
        index = lift(index, rows.ndim)
        if rows.shape[-2] == 1 and not at.dense:
            rows = rows.expand(*rows.shape[:2], *ids.shape[2:], -1)
        lead = [max(a, b) if a and b else 0 for a, b in zip(rows.shape[:-2], index.shape[:-2], strict=True)]
        rows = rows.expand(*lead, -1, -1)
        index = index.expand(*lead, tq, tk)
        if self.side == "query":
            return rows.gather(-1, index)
        return rows.gather(-1, index.transpose(-2, -1)).transpose(-2, -1)
