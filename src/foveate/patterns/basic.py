"""Patterns over a plain sequence (Full, Causal, SlidingWindow, Sinks), and given masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.axis import AxisRule, LocalAxis
from foveate.patterns.pattern import Pattern, check_int

# Up to this many entries an Explicit mask is printed wholly, so that its repr can be pasted.
_SHOWN = 64


def _always(q: Tensor, k: Tensor) -> Tensor:
    return (q >= 0) & (k >= 0)


class Full(Pattern):
    """Every query attends to every key: dense attention. The identity of `&`."""

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Everything."""
        return _always(q, k)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return (AxisRule.full(n_q, n_k),)


class Causal(Pattern):
    """Each query attends to the keys up to and including its own position.

    Args:
        align: "end": query i stands at key position n_k - n_q + i, so that the last query sees every key
            (decoding with a cache); "start": it stands at i, torch's `is_causal`. Equal when n_q == n_k.

    Raises:
        ArgumentError: if `align` is neither.
    """

    fields = ("align",)
    align: Literal["end", "start"]

    def __init__(self, align: Literal["end", "start"] = "end"):
        if align not in ("end", "start"):
            raise bad("align", align, "'end' or 'start'")
        self._store(align=align)

    def _shift(self, n_q: int, n_k: int) -> int:
        return n_k - n_q if self.align == "end" else 0

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Say `k <= position of q`."""
        return k <= q + self._shift(n_q, n_k)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return (AxisRule.causal(n_q, n_k, self._shift(n_q, n_k)),)


class SlidingWindow(Pattern):
    """Each query attends to `left` keys before and `right` keys after its position, and to its own.

    Query i stands at key position n_k - n_q + i, as in `Causal()`. Keys outside the sequence do not exist, so
    that windows shrink at the ends (`Neighborhood` keeps their size instead).

    Args:
        left: keys before the query's own, >= 0.
        right: keys after it, >= 0.

    Raises:
        ArgumentError: if one of them is not an integer >= 0.
    """

    fields = ("left", "right")
    left: int
    right: int

    def __init__(self, left: int, right: int = 0):
        self._store(left=check_int(left, "left", 0), right=check_int(right, "right", 0))

    @property
    def local(self) -> tuple[LocalAxis]:
        """The window as a LocalAxis of key positions."""
        return (LocalAxis(self.left + 1 + self.right, -self.left),)

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Say `position - left <= k <= position + right`."""
        return self.local[0].allowed(q + (n_k - n_q), k, n_k)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return (self.local[0].rule(n_q, n_k, n_k - n_q),)


class Sinks(Pattern):
    """Every query attends to the first `n` keys and to nothing else: attention sinks (arXiv 2309.17453).

    Made to be united: `SlidingWindow(255) | Sinks(4)`.

    Args:
        n: number of sink keys, >= 0.

    Raises:
        ArgumentError: if `n` is not an integer >= 0.
    """

    fields = ("n",)
    n: int

    def __init__(self, n: int):
        self._store(n=check_int(n, "n", 0))

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Say `k < n`."""
        return _always(q, k) & (k < self.n)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return (AxisRule.prefix(torch.full((n_q,), self.n), n_k),)


class Explicit(Pattern):
    """A mask given entry by entry. Equal by content; the repr shows small masks wholly, others by a digest.

    Args:
        mask: (n_q, n_k) bool, or nested lists of bools; True means "may attend". It is copied.

    Raises:
        ArgumentError: if it is not a 2-d boolean matrix.
    """

    fields = ("mask",)
    mask: Tensor
    digest: str

    def __init__(self, mask: Bool[Tensor, "n_q n_k"] | Sequence[Sequence[bool]]):
        matrix = mask if isinstance(mask, Tensor) else torch.tensor(mask)
        if matrix.dtype != torch.bool or matrix.dim() != 2:
            got = f"{matrix.dtype} of shape {tuple(matrix.shape)}"
            raise bad("mask", got, "a boolean matrix (n_q, n_k)", "True means 'may attend'.")
        matrix = matrix.detach().clone()
        self._store(mask=matrix, digest=_digest(matrix))

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless the lengths are the mask's."""
        super().check(n_q, n_k)
        for name, n, size in zip(("n_q", "n_k"), (n_q, n_k), self.mask.shape, strict=True):
            if n != size:
                raise bad(name, n, f"{size}, the size of the explicit mask {tuple(self.mask.shape)}")

    @property
    def tokens(self) -> int:
        """The number of queries (rows)."""
        return self.mask.shape[0]

    def _default_n_k(self, n_q: int) -> int:
        return self.mask.shape[1]

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Look the pair up."""
        return self.mask.to(q.device)[q, k]

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Return exactly the keys of these rows."""
        return self.mask[q_ids.to(self.mask.device)].any(0).nonzero().flatten().cpu()

    def _key(self) -> object:
        return (tuple(self.mask.shape), self.digest)

    def __repr__(self) -> str:
        if self.mask.numel() <= _SHOWN:
            return f"Explicit({self.mask.tolist()})"
        rows, columns = self.mask.shape
        return f"Explicit(<{rows}x{columns} mask {self.digest[:12]}>)"


class BlockList(Pattern):
    """Whole blocks of queries attend to whole blocks of keys.

    Args:
        block: block size, one integer or (queries, keys). The last block is smaller when it doesn't divide.
        pairs: either the (query block, key block) pairs that may attend, or a bool matrix
            (query blocks, key blocks).

    Raises:
        ArgumentError: if a size or a pair makes no sense.
    """

    fields = ("block", "pairs")
    block: tuple[int, int]
    pairs: tuple[tuple[int, int], ...]
    table: Tensor

    def __init__(
        self,
        block: int | tuple[int, int],
        pairs: Bool[Tensor, "q_blocks k_blocks"] | Iterable[tuple[int, int]],
    ):
        sizes = (block, block) if isinstance(block, int) else tuple(block)
        if len(sizes) != 2:
            raise bad("block", block, "one integer, or (queries, keys)")
        sizes = (check_int(sizes[0], "block", 1), check_int(sizes[1], "block", 1))
        if isinstance(pairs, Tensor):
            if pairs.dtype != torch.bool or pairs.dim() != 2:
                got = f"{pairs.dtype} of shape {tuple(pairs.shape)}"
                raise bad("pairs", got, "a boolean matrix (query blocks, key blocks), or pairs of blocks")
            pairs = [(a, b) for a, b in pairs.nonzero().tolist()]
        unique = sorted({(check_int(a, "pairs", 0), check_int(b, "pairs", 0)) for a, b in pairs})
        rows, columns = (1 + max([0, *(pair[side] for pair in unique)]) for side in (0, 1))
        table = torch.zeros(rows, columns, dtype=torch.bool)
        if unique:
            table[tuple(torch.tensor(unique).T)] = True
        self._store(block=sizes, pairs=tuple(unique), table=table)

    def _shown_arguments(self) -> list[str]:
        block = self.block[0] if self.block[0] == self.block[1] else self.block
        return [repr(block), repr(self.pairs)]

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError when a listed block lies beyond the sequence."""
        super().check(n_q, n_k)
        for side, n, size, name in zip((0, 1), (n_q, n_k), self.block, ("n_q", "n_k"), strict=True):
            last = max([-1, *(pair[side] for pair in self.pairs)])
            if last * size >= max(n, 1) and last >= 0:
                raise bad(name, n, f"more than {last * size}, as block {last} is listed")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Look the pair of blocks up."""
        table = self.table.to(q.device)
        a, b = q // self.block[0], k // self.block[1]
        inside = (a < table.shape[0]) & (b < table.shape[1])
        return table[a.clamp(max=table.shape[0] - 1), b.clamp(max=table.shape[1] - 1)] & inside

    @property
    def own_block(self) -> int:
        """The block of queries."""
        return self.block[0]

    def own_groups(self, n_q: int, n_k: int) -> tuple[Any, ...]:
        """Return one cell per listed block of queries."""
        from foveate.patterns.generic import lower_blocks

        return lower_blocks(self, n_q, n_k)

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Return exactly the keys of the blocks these queries stand in."""
        rows = (q_ids.cpu() // self.block[0]).unique()
        blocks = self.table[rows[rows < len(self.table)]].any(0).nonzero()
        keys = (blocks * self.block[1] + torch.arange(self.block[1])).flatten()
        return keys[keys < n_k]


def _digest(mask: Tensor) -> str:
    """Return a content hash of a bool matrix; packed to bits first, as `tolist` is the slow part."""
    bits = torch.nn.functional.pad(mask.flatten().to("cpu", torch.uint8), (0, -mask.numel() % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    return hashlib.blake2b(bytes(packed.tolist()), digest_size=16).hexdigest()
