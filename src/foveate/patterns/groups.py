"""`CellGroup`: many cells of one shape, and `ExplicitGroup`, the kind that lists its ids.

A cell is a small dense attention problem: `tq` query ids, `tk` key ids and a mask saying which pairs count.
Every backend executes cells and nothing else, so this file is the contract between *who* and *how fast*.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.lazy import cached_property
from foveate.patterns.arrays import broadcast_leading


class KeyRuns(NamedTuple):
    """The keys of each cell as runs of consecutive ids, for kernels that copy rows in blocks.

    Run `r` of cell `c` covers the ids `start .. start + length - 1`, which are columns
    `column .. column + length - 1` of the cell. Runs of length 0 are padding (their start is 0).
    """

    start: Int[Tensor, "b h c r"]
    length: Int[Tensor, "b h c r"]
    column: Int[Tensor, "b h c r"]


def pack_bits(mask: Bool[Tensor, "*lead tk"]) -> UInt8[Tensor, "*lead bytes"]:
    """Pack the last axis eight columns a byte, little-endian: column t is bit `t % 8` of byte `t // 8`."""
    *lead, tk = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -tk % 8)).reshape(*lead, -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def runs_of(ids: Int[Tensor, "*lead tk"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (start, length, column), each (*lead, runs), of the runs of consecutive ids; -1 is absent."""
    *lead, tk = ids.shape
    if tk == 0:
        return tuple(ids.new_zeros(*lead, 0) for _ in range(3))  # type: ignore[return-value]
    present = ids >= 0
    follows = torch.zeros_like(present)
    follows[..., 1:] = present[..., :-1] & (ids[..., 1:] == ids[..., :-1] + 1)
    begins = present & ~follows
    run = (begins.cumsum(-1) - 1).clamp_(min=0)
    count = int(begins.sum(-1).max()) if begins.numel() else 0
    columns = torch.arange(tk, device=ids.device).expand(ids.shape)
    out = [ids.new_zeros(*lead, count + 1) for _ in range(3)]
    # Entries that begin no run are sent to one spare slot at the end, which is cut off.
    where = torch.where(begins, run, count)
    out[0].scatter_(-1, where, torch.where(begins, ids, 0))
    out[1].scatter_add_(-1, torch.where(present, run, count), present.long())
    out[2].scatter_(-1, where, torch.where(begins, columns, 0))
    start, length, column = (o[..., :count] for o in out)
    return start, length, column


class CellGroup(ABC):
    """Many cells with one `tq x tk` shape.

    Subclasses: `BoxGroup` (closed form, nothing stored per token) and `ExplicitGroup` (tensors of ids).
    Ids are int64; -1 means absent (padding) and is always masked out. The leading dimensions `(b, h)` are
    (1, 1) when the cells are shared by all batches and heads. Everything that materialises takes a range
    `lo:hi` of cells, so that a caller can bound the memory it uses.
    """

    @property
    @abstractmethod
    def leading(self) -> tuple[int, int]:
        """(b, h): batches and heads that the group distinguishes."""

    @property
    @abstractmethod
    def n_cells(self) -> int:
        """Number of cells C, per batch and head."""

    @property
    @abstractmethod
    def tq(self) -> int:
        """Query slots of a cell."""

    @property
    @abstractmethod
    def tk(self) -> int:
        """Key slots of a cell."""

    @property
    @abstractmethod
    def pairs_needed(self) -> int:
        """Pairs that the masks let through, over all cells and over the group's own (b, h)."""

    @property
    @abstractmethod
    def full_cells(self) -> int:
        """Cells in which every pair counts, over the group's own (b, h)."""

    @property
    def pairs_computed(self) -> int:
        """Pairs that a dense computation of every cell touches, over the group's own (b, h)."""
        return math.prod(self.leading) * self.n_cells * self.tq * self.tk

    @property
    def is_full(self) -> bool:
        """Whether every pair of every cell counts, so that no mask is needed."""
        return self.full_cells == math.prod(self.leading) * self.n_cells

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors the group stores."""

    @abstractmethod
    def q_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "b h c tq"]:
        """Return the query ids of cells `lo:hi`."""

    @abstractmethod
    def k_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "b h c tk"]:
        """Return the key ids of cells `lo:hi`."""

    @abstractmethod
    def mask(self, lo: int = 0, hi: int | None = None) -> Bool[Tensor, "b h c tq tk"] | None:
        """Return which pairs count in cells `lo:hi` (c is 1 when all share one mask), None if all do."""

    @abstractmethod
    def mask_variants(self) -> Bool[Tensor, "b h v tq tk"] | None:
        """Return the distinct masks of the group, None when no mask is needed; see `mask_index`."""

    @abstractmethod
    def mask_index(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "c"] | None:
        """Return, for cells `lo:hi`, the position in `mask_variants` of each one's mask (None: no masks)."""

    @abstractmethod
    def key_runs(self, lo: int = 0, hi: int | None = None) -> KeyRuns:
        """Return the keys of cells `lo:hi` as runs of consecutive ids."""

    @abstractmethod
    def to(self, device) -> CellGroup:
        """Return the group with its tensors on `device`."""

    def packed_mask(self) -> UInt8[Tensor, "b h v tq bytes"] | None:
        """Return `mask_variants` with the key axis packed to bits (see `pack_bits`)."""
        variants = self.mask_variants()
        return None if variants is None else pack_bits(variants)


@dataclass(frozen=True, eq=False)
class ExplicitGroup(CellGroup):
    """Cells given by tensors of ids: routed selections, block lists, anything without a closed form.

    Args:
        query: (b, h, C, tq) int64 ids, -1 = absent.
        key: (b, h, C, tk) int64 ids, -1 = absent; b and h of the two broadcast against each other.
        allowed: bool, broadcastable to (b, h, C, tq, tk); None = every pair of present ids.

    Raises:
        ArgumentError: naming the tensor whose dtype or shape is wrong.
    """

    query: Int[Tensor, "bq hq c tq"]
    key: Int[Tensor, "bk hk c tk"]
    allowed: Bool[Tensor, "bm hm cm tqm tkm"] | None = None
    _lead: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self):
        for name, ids in (("q_ids", self.query), ("k_ids", self.key)):
            if ids.dtype != torch.int64:
                raise bad(name, ids.dtype, "int64 ids", "Convert them with .long().")
            if ids.ndim != 4:
                raise bad(name, tuple(ids.shape), "4 dimensions (b, h, cells, ids)")
        if self.query.shape[2] != self.key.shape[2]:
            raise bad(
                "k_ids", tuple(self.key.shape), f"as many cells as q_ids has, {self.query.shape[2]} (dim 2)"
            )
        shapes = [self.query.shape[:2], self.key.shape[:2]]
        if self.allowed is not None:
            shapes.append(self.allowed.shape[:2])
        lead = broadcast_leading(shapes)
        if lead is None:
            raise bad("q_ids, k_ids, mask", shapes, "leading (b, h) that broadcast together")
        object.__setattr__(self, "_lead", lead)
        if self.allowed is not None:
            self._check_mask(self.allowed)

    def _check_mask(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise bad("mask", mask.dtype, "a bool mask, True = may attend")
        want = (*self._lead, self.n_cells, self.tq, self.tk)
        ok = mask.ndim == 5 and all(m in (1, w) for m, w in zip(mask.shape, want, strict=True))
        if not ok:
            raise bad("mask", tuple(mask.shape), f"a shape that broadcasts to {want} (b, h, cells, tq, tk)")

    @property
    def leading(self) -> tuple[int, int]:
        """(b, h) of the ids and the mask together."""
        return self._lead

    @property
    def n_cells(self) -> int:
        """Number of cells C, per batch and head."""
        return self.query.shape[2]

    @property
    def tq(self) -> int:
        """Query slots of a cell."""
        return self.query.shape[3]

    @property
    def tk(self) -> int:
        """Key slots of a cell."""
        return self.key.shape[3]

    @cached_property
    def _absent(self) -> bool:
        # Reading the ids would break a graph, so that compiled code always looks.
        return torch.compiler.is_compiling() or bool((self.query < 0).any() or (self.key < 0).any())

    @cached_property
    def _pairs_per_cell(self) -> Tensor:
        """(b, h, C) number of pairs each cell lets through."""
        if self.allowed is None:
            pairs = (self.query >= 0).sum(-1) * (self.key >= 0).sum(-1)
        else:
            mask = self.mask()
            assert mask is not None
            pairs = mask.sum((-1, -2))
        return pairs.expand(*self._lead, self.n_cells)

    @cached_property
    def pairs_needed(self) -> int:
        """Pairs that the masks let through, over all cells and over the group's own (b, h)."""
        return int(self._pairs_per_cell.sum())

    @cached_property
    def full_cells(self) -> int:
        """Cells in which every pair counts, over the group's own (b, h)."""
        return int((self._pairs_per_cell == self.tq * self.tk).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors the group stores."""
        tensors = (self.query, self.key) + (() if self.allowed is None else (self.allowed,))
        return sum(t.numel() * t.element_size() for t in tensors)

    def q_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "b h c tq"]:
        """Return the query ids of cells `lo:hi`, (b or 1, h or 1, c, tq)."""
        return self.query[:, :, lo:hi]

    def k_ids(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "b h c tk"]:
        """Return the key ids of cells `lo:hi`, (b or 1, h or 1, c, tk)."""
        return self.key[:, :, lo:hi]

    def mask(self, lo: int = 0, hi: int | None = None) -> Bool[Tensor, "b h c tq tk"] | None:
        """Return the stored mask and the absence of ids together; None when nothing is masked."""
        mask = self.allowed
        if mask is not None:
            cells = mask if mask.shape[2] == 1 else mask[:, :, lo:hi]
            mask = cells.expand(*cells.shape[:3], self.tq, self.tk)
        if self._absent:
            q, k = self.q_ids(lo, hi), self.k_ids(lo, hi)
            present = (q >= 0)[..., :, None] & (k >= 0)[..., None, :]
            mask = present if mask is None else mask & present
        return mask

    def mask_variants(self) -> Bool[Tensor, "b h v tq tk"] | None:
        """Return `mask()`: every cell has its own (or all share one)."""
        return self.mask()

    def mask_index(self, lo: int = 0, hi: int | None = None) -> Int[Tensor, "c"] | None:
        """Return each cell's position in `mask_variants`, None when there is no mask."""
        mask = self.mask(0, 1)
        if mask is None:
            return None
        shared = not self._absent and self.allowed is not None and self.allowed.shape[2] == 1
        index = torch.arange(self.n_cells, device=self.query.device)[lo:hi]
        return index * 0 if shared else index

    def key_runs(self, lo: int = 0, hi: int | None = None) -> KeyRuns:
        """Return the keys of cells `lo:hi` as runs of consecutive ids."""
        return KeyRuns(*runs_of(self.k_ids(lo, hi)))

    def to(self, device) -> ExplicitGroup:
        """Return the group with its tensors on `device`."""
        allowed = None if self.allowed is None else self.allowed.to(device)
        return ExplicitGroup(self.query.to(device), self.key.to(device), allowed)
