"""`Cells`: the tensors of a Selection. Dense blocks of queries and keys, less what a mask takes away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.patterns.groups import ExplicitGroup


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of one shape. Leading sizes `b`, `h` are 1 where batch elements or heads share them.

    Attributes:
        q_ids: (b, h, C, tq) int64 query ids; -1 is no query.
        k_ids: (b, h, C, tk) int64 key ids; -1 is no key.
        mask: bool, broadcastable to (b, h, C, tq, tk), or None; True means "may attend".
    """

    q_ids: Int[Tensor, "b h c tq"]
    k_ids: Int[Tensor, "b h c tk"]
    mask: Bool[Tensor, "..."] | None = None

    def group(self) -> ExplicitGroup:
        """Return the cells as a Schedule has them."""
        return ExplicitGroup(self.q_ids, self.k_ids, self.mask)

    def to(self, device: torch.device | str) -> Cells:
        """Return the cells with their tensors on `device`."""
        mask = None if self.mask is None else self.mask.to(device)
        return Cells(self.q_ids.to(device), self.k_ids.to(device), mask)

    def allowed(self) -> Bool[Tensor, "b h c tq tk"]:
        """Return the mask with absent queries and keys taken out."""
        present = (self.q_ids >= 0)[..., :, None] & (self.k_ids >= 0)[..., None, :]
        return present if self.mask is None else present & self.mask

    def filtered(self, keep: Bool[Tensor, "..."]) -> Cells:
        """Return the cells with the pairs that `keep` (broadcastable) says."""
        return cells_of(self.q_ids, self.k_ids, keep if self.mask is None else self.mask & keep)

    def codes(self, n_q: int, n_k: int) -> Int[Tensor, "b h pairs"]:
        """Number each pair `q * n_k + k`; pairs that are masked out get `n_q * n_k`."""
        pair = self.q_ids[..., :, None] * n_k + self.k_ids[..., None, :]
        return pair.masked_fill(~self.allowed(), n_q * n_k).flatten(2)

    def spread(self, b: int, h: int) -> Cells:
        """Return the cells with leading sizes (b, h), as views."""
        return Cells(self.q_ids.expand(b, h, -1, -1), self.k_ids.expand(b, h, -1, -1), self.mask)

    def shifted(self, keys: int) -> Cells:
        """Return the cells with all key ids moved by `keys`."""
        return self if keys == 0 else Cells(self.q_ids, _moved(self.k_ids, keys), self.mask)

    def same_queries(self, other: Cells) -> bool:
        """Whether both list the same queries. Values are compared on the CPU only, elsewhere it would wait."""
        if torch.compiler.is_compiling() or self.q_ids.shape[2:] != other.q_ids.shape[2:]:
            return False
        if self.q_ids.data_ptr() == other.q_ids.data_ptr() and self.q_ids.stride() == other.q_ids.stride():
            return self.q_ids.shape == other.q_ids.shape
        return self.q_ids.device.type == "cpu" and bool((self.q_ids == other.q_ids).all())

    def beside(self, other: Cells) -> Cells:
        """Return cells of the same queries with the keys of both."""
        b, h = (max(a, c) for a, c in zip(self.q_ids.shape[:2], other.q_ids.shape[:2], strict=True))
        both = [cell.spread(b, h) for cell in (self, other)]
        k_ids = torch.cat([cell.k_ids for cell in both], dim=-1)
        masks = [cell.mask for cell in both]
        if all(mask is None for mask in masks):
            return Cells(both[0].q_ids, k_ids, None)
        whole = (b, h, *self.q_ids.shape[2:])
        grown = []
        for cell, mask in zip(both, masks, strict=True):
            every = torch.ones((), dtype=torch.bool, device=k_ids.device) if mask is None else mask
            grown.append(every.expand(*whole, cell.k_ids.shape[3]))
        return Cells(both[0].q_ids, k_ids, torch.cat(grown, dim=-1))

    def tiles(self, tile: int) -> list[Cells]:
        """Return the same pairs in cells of at most `tile` queries, less the keys that none of them needs."""
        b, h, cells, tq = self.q_ids.shape
        if 0 in (b, h, cells, tq):
            return [self]
        # Even parts: a cell slightly larger than a tile is halved, not cut into a whole and a crumb.
        pieces = -(-tq // tile)
        tile = -(-tq // pieces)
        rest = pieces * tile - tq
        q_ids = torch.nn.functional.pad(self.q_ids, (0, rest), value=-1).reshape(b, h, -1, tile)
        allowed = self.allowed()
        allowed = torch.nn.functional.pad(allowed, (0, 0, 0, rest)).reshape(*q_ids.shape, self.k_ids.shape[3])
        k_ids = self.k_ids.repeat_interleave(pieces, dim=2)
        needed = allowed.any(-2)
        front = (~needed).long().argsort(dim=-1, stable=True)
        k_ids = torch.where(needed, k_ids, -1).gather(-1, front)
        # Tiles that need about as many keys (up to the next power of two) share a shape.
        count = needed.sum(-1).flatten(0, 1).amax(0)
        kind = torch.bucketize(count, 1 << torch.arange(40, device=count.device))
        parts = []
        for which in torch.unique(kind[count > 0]).tolist():
            some = ((kind == which) & (count > 0)).nonzero().flatten()
            width = int(count[some].max())
            columns = front[:, :, some, None, :width].expand(-1, -1, -1, tile, -1)
            mask = allowed[:, :, some].gather(-1, columns)
            parts.append(Cells(q_ids[:, :, some], k_ids[:, :, some, :width], mask))
        nothing = torch.full((b, h, 1, 1), -1, device=q_ids.device)
        return parts or [Cells(nothing, nothing)]


def _moved(ids: Tensor, by: int) -> Tensor:
    return torch.where(ids < 0, -1, ids + by)


def cells_of(q_ids: Tensor, k_ids: Tensor, mask: Tensor | None) -> Cells:
    """Bring ids and mask to common leading sizes, as views.

    Raises:
        RuntimeError: if the shapes do not broadcast.
    """
    lead = [q_ids.shape[:2], k_ids.shape[:2]]
    if mask is not None:
        mask = mask.reshape((1,) * (5 - mask.dim()) + mask.shape)
        whole = (*q_ids.shape[2:], k_ids.shape[3])
        if mask.dim() != 5 or any(
            size not in (1, want) for size, want in zip(mask.shape[2:], whole, strict=True)
        ):
            raise RuntimeError("the mask does not fit the cells")
        lead.append(mask.shape[:2])
    b, h = torch.broadcast_shapes(*lead)
    return Cells(q_ids.expand(b, h, -1, -1), k_ids.expand(b, h, -1, -1), mask)
