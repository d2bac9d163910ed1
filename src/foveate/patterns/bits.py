"""Cells whose masks are words: one 64-bit number per key says which of at most 64 queries see it.

A choice that is made key by key is a few numbers per key long before it is a table of pairs. Kernels that read words
never see the table; everybody else gets it unpacked, on demand.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.lazy import cached_property
from foveate.patterns.arrays import broadcast_leading
from foveate.patterns.cells import Cells
from foveate.patterns.groups import ExplicitGroup

WORD = 64


def unpack(words: Int[Tensor, "*lead tk"], tq: int) -> Bool[Tensor, "*lead tq tk"]:
    """Return bit i of every word as row i of a mask."""
    rows = torch.arange(tq, device=words.device)
    return (words[..., None, :] >> rows[:, None] & 1).bool()


def low_bits(count: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Return words whose `count` lowest bits are set, 0 <= count <= 64."""
    shift = torch.ones_like(count) << count.clamp(max=62)
    words = shift - 1
    words = torch.where(count == 63, (1 << 63) - 1, words)
    return torch.where(count == 64, -1, words)


def count_bits(words: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return how many bits of every word are set."""
    total = torch.zeros_like(words)
    # Halves, since shifts of negative numbers bring the sign along.
    for half in (words & 0xFFFFFFFF, words >> 32 & 0xFFFFFFFF):
        pairs = half - (half >> 1 & 0x55555555)
        nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
        octets = nibbles + (nibbles >> 4) & 0x0F0F0F0F
        total += octets * 0x01010101 >> 24 & 0xFF
    return total


class BitGroup(ExplicitGroup):
    """Cells given by ids, with a word per key instead of a mask.

    Args:
        query: (b, h, C, tq) int64 ids, -1 = absent; tq <= 64.
        key: (b, h, C, tk) int64 ids, -1 = absent.
        words: (b, h, C, tk) int64; bit i is set where query i of the cell sees the key. Words of absent keys are
            0, and so are bits of absent queries.

    Raises:
        ArgumentError: naming the tensor whose shape or dtype is wrong.
    """

    words: Int[Tensor, "b h c tk"]

    def __init__(
        self,
        query: Int[Tensor, "bq hq c tq"],
        key: Int[Tensor, "bk hk c tk"],
        words: Int[Tensor, "bw hw c tk"],
    ):
        for name, ids in (("q_ids", query), ("k_ids", key), ("words", words)):
            if ids.dtype != torch.int64 or ids.ndim != 4 or ids.shape[2] != query.shape[2]:
                shown = f"{ids.dtype} of shape {tuple(ids.shape)}"
                raise bad(name, shown, f"int64 (b, h, {query.shape[2]}, ids), as many cells as q_ids has")
        if query.shape[3] > WORD:
            raise bad("q_ids", tuple(query.shape), f"at most {WORD} queries in a cell, one per bit")
        if words.shape[3] != key.shape[3]:
            raise bad("words", tuple(words.shape), f"{key.shape[3]} words in a cell, one per key")
        lead = broadcast_leading([x.shape[:2] for x in (query, key, words)])
        if lead is None:
            raise bad("q_ids, k_ids, words", tuple(words.shape), "leading (b, h) that broadcast together")
        for name, value in (("query", query), ("key", key), ("words", words), ("_lead", lead)):
            object.__setattr__(self, name, value)

    @cached_property
    def allowed(self) -> Bool[Tensor, "b h c tq tk"]:  # type: ignore[override]
        """The mask, unpacked."""
        return unpack(self.words, self.tq)

    @cached_property
    def _pairs_per_cell(self) -> Tensor:
        return count_bits(self.words).sum(-1).expand(*self._lead, self.n_cells)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors the group stores."""
        return sum(t.numel() * t.element_size() for t in (self.query, self.key, self.words))

    def to(self, device) -> BitGroup:
        """Return the group with its tensors on `device`."""
        return BitGroup(self.query.to(device), self.key.to(device), self.words.to(device))


class BitCells(Cells):
    """Cells with a word per key, see `BitGroup`."""

    words: Int[Tensor, "b h c tk"]

    def __init__(
        self, q_ids: Int[Tensor, "b h c tq"], k_ids: Int[Tensor, "b h c tk"], words: Int[Tensor, "b h c tk"]
    ):
        b, h = torch.broadcast_shapes(q_ids.shape[:2], k_ids.shape[:2], words.shape[:2])
        for name, value in (("q_ids", q_ids), ("k_ids", k_ids), ("words", words)):
            object.__setattr__(self, name, value.expand(b, h, -1, -1))

    @cached_property
    def mask(self) -> Bool[Tensor, "b h c tq tk"]:  # type: ignore[override]
        """The mask, unpacked."""
        return unpack(self.words, self.q_ids.shape[3])

    def group(self) -> BitGroup:
        """Return the cells as a Schedule has them."""
        return BitGroup(self.q_ids, self.k_ids, self.words)

    def to(self, device: torch.device | str) -> BitCells:
        """Return the cells with their tensors on `device`."""
        return BitCells(self.q_ids.to(device), self.k_ids.to(device), self.words.to(device))


def cells_of_bits(q_ids: Tensor, k_ids: Tensor, words: Tensor) -> Cells:
    """Return `BitCells`; plain ones with a mask while torch.compile traces, which knows no such class."""
    if not torch.compiler.is_compiling():
        return BitCells(q_ids, k_ids, words)
    b, h = torch.broadcast_shapes(q_ids.shape[:2], k_ids.shape[:2], words.shape[:2])
    q_ids, k_ids = (ids.expand(b, h, -1, -1) for ids in (q_ids, k_ids))
    return Cells(q_ids, k_ids, unpack(words.expand(b, h, -1, -1), q_ids.shape[3]))
