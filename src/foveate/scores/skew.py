"""`RelativeLogits`: products of queries with embeddings of relative positions, read in linear memory.

A learned vector e_r per offset r adds q_i . e_(j - i) to the logit of query i and key j. Gathering the vectors takes
N^2 D numbers; multiplying every query with the R vectors first takes N R, and a change of shape then puts each product
where it belongs ("skewing", Music Transformer, arXiv 1809.04281). The way back sums weights by offset, which is what
relative embeddings on the value side need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Additive, Extent, check_fits, lift, need_float
from foveate.scores.pairs import Pairs, take_rows


def skew(
    rows: Float[Tensor, "*batch n_q r"], n_k: int, *, first: int, shift: int | None = None
) -> Float[Tensor, "*batch n_q n_k"]:
    """Turn one column per offset into one column per key: `out[i, j] = rows[i, j - i - shift - first]`.

    Pairs whose offset has no column get 0. Nothing larger than N_q x (N_q + N_k) is made.

    Args:
        rows: column r of query i belongs to the key `first + r` places after the query.
        n_k: number of keys.
        first: offset (key - query) of column 0.
        shift: position of query 0 among the keys; `n_k - n_q` by default (queries at the end).
    """
    n_q = rows.shape[-2]
    shift = n_k - n_q if shift is None else shift
    if n_q == 0 or n_k == 0:
        return rows.new_zeros(*rows.shape[:-1], n_k) + 0.0 * rows.sum()
    # Columns for every offset from the last query's first key to the first query's last one.
    wide = columns(rows, first, -shift - (n_q - 1), n_q + n_k - 1)
    if n_q == 1:
        return wide
    flat = wide.flatten(-2)[..., n_q - 1 : -1]
    return flat.unflatten(-1, (n_q, n_q + n_k - 2))[..., :n_k]


def unskew(
    weights: Float[Tensor, "*batch n_q n_k"], r: int, *, first: int, shift: int | None = None
) -> Float[Tensor, "*batch n_q r"]:
    """Turn one column per key into one per offset, the way back of `skew`.

    `out[i, r] = weights[i, i + shift + first + r]`, 0 where there is no such key.

    Args:
        weights: a map over queries and keys.
        r: number of offsets wanted.
        first: offset (key - query) of column 0.
        shift: position of query 0 among the keys; `n_k - n_q` by default.
    """
    n_q, n_k = weights.shape[-2:]
    shift = n_k - n_q if shift is None else shift
    if n_q == 0 or n_k == 0:
        return weights.new_zeros(*weights.shape[:-1], r) + 0.0 * weights.sum()
    wide = weights
    if n_q > 1:
        flat = F.pad(weights, (0, n_q - 2)).flatten(-2)
        wide = F.pad(flat, (n_q - 1, 1)).unflatten(-1, (n_q, n_q + n_k - 1))
    return columns(wide, -shift - (n_q - 1), first, r)


def columns(
    rows: Float[Tensor, "*batch n_q r"], first: int, wanted: int, count: int
) -> Float[Tensor, "*batch n_q count"]:
    """Return the `count` columns from offset `wanted` on of rows whose columns start at `first`; 0 where none is."""
    left = first - wanted
    # In two steps: a pad that crops more than there is would raise.
    if left <= -rows.shape[-1] or left >= count:
        return rows.new_zeros(*rows.shape[:-1], count) + 0.0 * rows.sum()
    return F.pad(rows, (left, count - left - rows.shape[-1]))


def relative_values(
    weights: Float[Tensor, "b h n_q n_k"], table: Float[Tensor, "#h r d"], *, first: int
) -> Float[Tensor, "b h n_q d"]:
    """Return what embeddings on the value side add: `out[i] = sum_j weights[i, j] table[j - i - first]`.

    Weights are summed by offset first, so that the table is never spread over pairs.

    Args:
        weights: attention weights; queries stand at the end of the keys.
        table: one vector per head (or for all) and offset.
        first: offset (key - query) of row 0 of the table; offsets beyond the table add nothing.
    """
    return unskew(weights, table.shape[-2], first=first) @ table.to(weights.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class RelativeLogits(Additive):
    """Add `U[b, h, q, o - first]`, where o = key position - query position; 0 where U has no column for o.

    U is the product of queries with embeddings of offsets (plus, if you like, a bias per offset):

        table = nn.Parameter(torch.zeros(heads, 128, width))         # offsets -127 .. 0
        score = RelativeLogits(width**-0.5 * q @ table.mT, first=-127)

    Args:
        U: float `(B or 1, H or 1, N_q, R)`, with gradient.
        first: the offset of column 0.
        align: "end": the queries stand at the end of the keys (decoding); "start": at their start.
    """

    U: Tensor
    first: int
    align: Literal["end", "start"] = "end"

    def __post_init__(self):
        need_float(self, "U", self.U)
        if isinstance(self.first, bool) or not isinstance(self.first, int):
            raise bad("RelativeLogits.first", self.first, "an integer, the offset of column 0")
        if self.align not in ("end", "start"):
            raise bad("RelativeLogits.align", self.align, "'end' or 'start'")

    def check(self, extent: Extent) -> None:
        """Raise unless U has one row per query."""
        if self.U.ndim != 4 or self.U.shape[2] != extent.n_q or not self.U.shape[3]:
            expected = f"(B or 1, H or 1, N_q = {extent.n_q}, R) with R >= 1"
            raise bad("RelativeLogits.U", tuple(self.U.shape), expected)
        check_fits(self, "U", self.U.shape[:3], (extent.batch, extent.heads, extent.n_q), "(B, H, N_q)")

    def shift(self, n_q: int, n_k: int) -> int:
        """Return the position of query 0 among `n_k` real keys."""
        return n_k - n_q if self.align == "end" else 0

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the products at the pairs."""
        shift = self.shift(at.n_q, at.n_k if at.frame is None else at.frame.base.numel)
        if at.dense and at.frame is None:
            return skew(self.U, at.n_k, first=self.first, shift=shift)
        (offset,) = at.offsets(None)
        column = offset - shift - self.first
        rows = self.U if at.dense else take_rows(self.U, at.q)
        if rows.shape[-2] == 1 and not at.dense:
            rows = rows.expand(*rows.shape[:2], *at.q.shape[2:], -1)
        column = lift(column, rows.ndim)
        lead = [max(a, b) if a and b else 0 for a, b in zip(rows.shape[:-2], column.shape[:-2], strict=True)]
        column = column.expand(*lead, *column.shape[-2:])
        known = (column >= 0) & (column < rows.shape[-1])
        found = rows.expand(*lead, -1, -1).gather(-1, column.clamp(0, rows.shape[-1] - 1))
        return torch.where(known, found, found.new_zeros(()))
