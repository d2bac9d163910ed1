"""`BucketTable`: one number per head and bucket of offsets; far offsets share buckets that grow like a logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Additive, Extent, need_float
from foveate.scores.pairs import Pairs


class Buckets(Protocol):
    """Anything that maps offsets (key - query) to rows of a table; the classes below are such."""

    @property
    def rows(self) -> int:
        """How many rows a table needs."""
        ...

    def __call__(self, offset: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return row numbers 0 <= row < rows."""
        ...


def _log_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Number distances 0, 1, 2, ...: half of the buckets hold one distance each, the others ever more of them."""
    exact = buckets // 2
    # In float32, as published: where a logarithm is nearly whole, precision decides the bucket.
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp_max(buckets - 1))


def _check(part: object, buckets: int, per_side: int, max_distance: int) -> None:
    name = type(part).__name__
    if isinstance(buckets, bool) or not isinstance(buckets, int) or per_side < 2:
        raise bad(f"{name}.buckets", buckets, "an integer that gives each side 2 buckets or more")
    if isinstance(max_distance, bool) or not isinstance(max_distance, int) or max_distance <= per_side // 2:
        expected = f"an integer above {per_side // 2}, the distances with a bucket of their own"
        raise bad(f"{name}.max_distance", max_distance, expected)


@dataclass(frozen=True)
class ClippedOffsets:
    """A row for every offset up to `reach` either way; farther ones share the last rows (arXiv 1803.02155).

    Args:
        reach: rows are for offsets -reach .. reach.
    """

    reach: int

    def __post_init__(self):
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or self.reach < 0:
            raise bad("ClippedOffsets.reach", self.reach, "a number of tokens")

    @property
    def rows(self) -> int:
        """How many rows a table needs."""
        return 2 * self.reach + 1

    def __call__(self, offset: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the rows of offsets key - query."""
        return offset.clamp(-self.reach, self.reach) + self.reach


@dataclass(frozen=True)
class T5Buckets:
    """The buckets of T5 (arXiv 1910.10683).

    Args:
        buckets: rows in all.
        max_distance: from here on all distances share the last bucket.
        bidirectional: half of the rows for keys at or before the query, half for keys behind it. Otherwise all
            rows are for keys at or before it, and later keys read row 0.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self):
        _check(self, self.buckets, self._side, self.max_distance)

    @property
    def _side(self) -> int:
        return self.buckets // 2 if self.bidirectional else self.buckets

    @property
    def rows(self) -> int:
        """How many rows a table needs."""
        return self.buckets

    def __call__(self, offset: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the rows of offsets key - query."""
        if not self.bidirectional:
            return _log_bucket((-offset).clamp_min(0), self._side, self.max_distance)
        return _log_bucket(offset.abs(), self._side, self.max_distance) + (offset > 0).long() * self._side


@dataclass(frozen=True)
class SignedBuckets:
    """Buckets in the order of offsets: farthest before, ..., 0, ..., farthest behind (URPE, arXiv 2205.13401).

    Args:
        buckets: twice the buckets of one side; the bucket of offset 0 belongs to both.
        max_distance: from here on all distances share the last bucket of their side.
        gap: unused rows between offsets -1 and 0; the authors' code leaves 2.
        length: count rows from the farthest bucket of this many tokens on, as the authors' code does, instead of
            from the farthest of all.
    """

    buckets: int = 64
    max_distance: int = 128
    gap: int = 0
    length: int | None = None

    def __post_init__(self):
        _check(self, self.buckets, self.buckets // 2, self.max_distance)
        if self.gap < 0:
            raise bad("SignedBuckets.gap", self.gap, "a count of rows")
        if self.length is not None and self.length < 1:
            raise bad("SignedBuckets.length", self.length, "a positive number of tokens, or None")

    @property
    def rows(self) -> int:
        """How many rows a table needs."""
        return 2 * (self.buckets // 2) - 1 + self.gap

    def __call__(self, offset: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the rows of offsets key - query."""
        side = self.buckets // 2
        low = side - 1
        if self.length is not None:
            low = int(_log_bucket(torch.tensor(self.length - 1), side, self.max_distance))
        found = _log_bucket(offset.abs(), side, self.max_distance) * offset.sign()
        return (found + (offset >= 0).long() * self.gap + low).clamp(0, self.rows - 1)


def bucket_map(buckets: Buckets, n: int) -> Int[Tensor, "n n"]:
    """Return the row that each pair of n tokens reads: queries downwards, keys to the right."""
    at = torch.arange(n)
    return buckets(at - at[:, None])


@dataclass(frozen=True, eq=False, repr=False)
class BucketTable(Additive):
    """Add `table[h, bucket(key position - query position)]`; as `Multiply(BucketTable(...))`, factors after the rule.

    Args:
        table: float `(H or 1, rows)`, with gradient.
        buckets: which row an offset reads: `T5Buckets()`, `SignedBuckets()`, or any function with `rows`.
        align: "end": the queries stand at the end of the keys (decoding); "start": at their start.
    """

    table: Tensor
    buckets: Buckets
    align: Literal["end", "start"] = "end"

    def __post_init__(self):
        need_float(self, "table", self.table)
        if self.table.ndim != 2 or self.table.shape[1] != self.buckets.rows:
            expected = f"(heads, {self.buckets.rows}) for {self.buckets}"
            raise bad("BucketTable.table", tuple(self.table.shape), expected)
        if self.align not in ("end", "start"):
            raise bad("BucketTable.align", self.align, "'end' or 'start'")

    def check(self, extent: Extent) -> None:
        """Raise unless the table has 1 or H heads."""
        if self.table.shape[0] not in (1, extent.heads):
            raise bad("BucketTable.table", tuple(self.table.shape), f"1 or {extent.heads} heads in front")

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the table's entries at the pairs."""
        real = at.n_k if at.frame is None else at.frame.base.numel
        shift = real - at.n_q if self.align == "end" else 0
        if at.dense and at.frame is None:
            # One number per offset first: a table of N_q + N_k - 1 entries, then as many reads as pairs.
            steps = torch.arange(1 - at.n_q, at.n_k, device=self.table.device)
            line = self.table.index_select(1, self.buckets(steps - shift))
            index = at.k[..., None, :] - at.q[..., :, None] + (at.n_q - 1)
            return line[:, index[0, 0]].unsqueeze(0)
        (offset,) = at.offsets(None)
        index = self.buckets(offset - shift)
        if index.shape[0] == 1 and index.shape[1] == 1:
            found = self.table.index_select(1, index.reshape(-1))
            return found.reshape(1, self.table.shape[0], *index.shape[2:])
        heads = torch.arange(self.table.shape[0], device=index.device).reshape(-1, *([1] * (index.ndim - 2)))
        return self.table[heads, index]
