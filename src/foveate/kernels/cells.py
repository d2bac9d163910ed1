"""Items: cells that can be gathered and scattered.

An item is either a pair of boxes (views of a grid, `boxes.py`) or two tables of ids.
Gathered cells have the layout `(c0, b, h, c1, t, d)` of `boxes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from foveate.kernels.boxes import Box


class CellView(NamedTuple):
    """One item as tensors, for code that forms logits: ids with cells along (c0, c1), and what they have in
    common.

    Attributes:
        q_ids: -1 = absent.
        k_ids: -1 = absent.
        mask: None when every pair counts.
        alike: all cells have the same key - query offsets.
        static: all batches and heads share the cells.
    """

    q_ids: Int[Tensor, "b h c0 c1 tq"]
    k_ids: Int[Tensor, "b h c0 c1 tk"]
    mask: Bool[Tensor, "b h c0 c1 tq tk"] | None
    alike: bool
    static: bool


@dataclass(frozen=True, eq=False)
class BoxItem:
    """Cells of a BoxGroup: boxes of queries, boxes of keys, and the mask they share."""

    q: Box
    k: Box
    mask: Bool[Tensor, "1 1 c0 c1 tq tk"] | None

    per_head = False
    static = True

    @property
    def cells(self) -> int:
        """Cells that `narrow` chooses from."""
        return self.q.c0

    @property
    def c0(self) -> int:
        """Cells along c0."""
        return self.q.c0

    @property
    def c1(self) -> int:
        """Cells along c1."""
        return self.q.c1

    @property
    def tq(self) -> int:
        """Queries of a cell."""
        return self.q.tokens

    @property
    def tk(self) -> int:
        """Keys of a cell."""
        return self.k.tokens

    def key_rows(self) -> int:
        """Rows per (b, h) that gathering the keys copies."""
        return self.k.stored_rows()

    def narrow(self, first: int, last: int) -> BoxItem:
        """Keep the cells `first <= c0 < last`."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, first:last]
        return BoxItem(self.q.narrow(first, last), self.k.narrow(first, last), mask)

    def take_q(self, x: Shaped[Tensor, "b h n d"]) -> Shaped[Tensor, "c0 b h c1 tq d"]:
        """Gather queries."""
        return self.q.take(x)

    def take_k(self, x: Shaped[Tensor, "b h n d"], heads: int = 0) -> Shaped[Tensor, "c0 b h c1 tk d"]:
        """Gather keys (of the key heads)."""
        return self.k.take(x)

    def put_q(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 tq d"]) -> None:
        """Write rows that are in no other cell."""
        self.q.put(x, cells)

    def add_q(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 tq d"]) -> None:
        """Add query rows, in place."""
        self.q.add_to(x, cells)

    def add_k(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 tk d"]) -> None:
        """Add key rows, in place."""
        self.k.add_to(x, cells)

    def view(self, n_q: int, n_k: int, device: torch.device) -> CellView:
        """Return the item as tensors."""
        both = []
        for box, n in ((self.q, n_q), (self.k, n_k)):
            line = torch.arange(n, device=device).view(1, 1, n, 1)
            both.append(box.take(line).reshape(1, 1, box.c0, box.c1, box.tokens))
        alike = not self.k.lead and all(
            (q.outer == 1 or q.outer_step == k.outer_step) and (q.inner == 1 or q.inner_step == k.inner_step)
            for q, k in zip(self.q.runs, self.k.runs, strict=True)
        )
        return CellView(both[0], both[1], self.mask, alike, True)


@dataclass(frozen=True, eq=False)
class IndexItem:
    """Cells given by ids, -1 = absent. Static ones stand along c0, those of a (batch, head) along c1."""

    q_ids: Int[Tensor, "b h c tq"]
    k_ids: Int[Tensor, "b h c tk"]
    mask: Bool[Tensor, "b h c0 c1 tq tk"] | None

    @property
    def per_head(self) -> bool:
        """Whether cells differ between heads, so that query heads cannot share gathered keys."""
        return self.q_ids.shape[1] > 1 or self.k_ids.shape[1] > 1

    @property
    def static(self) -> bool:
        """Whether all batches and heads share the cells."""
        return self.q_ids.shape[:2] == (1, 1) and self.k_ids.shape[:2] == (1, 1)

    @property
    def cells(self) -> int:
        """Cells that `narrow` chooses from."""
        return self.q_ids.shape[2]

    @property
    def c0(self) -> int:
        """Cells along c0."""
        return self.q_ids.shape[2] if self.static else 1

    @property
    def c1(self) -> int:
        """Cells along c1."""
        return 1 if self.static else self.q_ids.shape[2]

    @property
    def tq(self) -> int:
        """Queries of a cell."""
        return self.q_ids.shape[3]

    @property
    def tk(self) -> int:
        """Keys of a cell."""
        return self.k_ids.shape[3]

    def key_rows(self) -> int:
        """Rows per (b, h) that gathering the keys copies."""
        return self.k_ids.shape[2] * self.tk

    def narrow(self, first: int, last: int) -> IndexItem:
        """Keep the cells `first <= c < last`."""
        cut = slice(first, last)
        mask = self.mask
        if mask is not None and mask.shape[2 if self.static else 3] > 1:
            mask = mask[:, :, cut] if self.static else mask[:, :, :, cut]
        return IndexItem(self.q_ids[:, :, cut], self.k_ids[:, :, cut], mask)

    def take_q(self, x: Shaped[Tensor, "b h n d"]) -> Shaped[Tensor, "c0 b h c1 tq d"]:
        """Gather queries; absent ones read row 0."""
        return self._take(x, self.q_ids, x.shape[1])

    def take_k(self, x: Shaped[Tensor, "b hkv n d"], heads: int = 0) -> Shaped[Tensor, "c0 b h c1 tk d"]:
        """Gather keys; absent ones read row 0. With cells per head, the result has `heads` heads."""
        return self._take(x, self.k_ids, heads if self.per_head and heads else x.shape[1])

    def put_q(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 tq d"]) -> None:
        """Write rows that are in no other cell; absent ones go nowhere."""
        if self.static:
            rows, values, dim = (
                self.q_ids.reshape(-1),
                cells[:, :, :, 0].permute(1, 2, 0, 3, 4).flatten(2, 3),
                2,
            )
        else:
            rows, values, dim = self._rows(x, self.q_ids, x.shape[1]), self._flat(cells), 0
            x = x.view(-1, x.shape[-1])
        here = rows >= 0
        if not bool(here.all()):
            rows, values = rows[here], values[:, :, here] if self.static else values[here]
        x.index_copy_(dim, rows, values.to(x.dtype))

    def add_q(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 tq d"]) -> None:
        """Add query rows, in place."""
        self._add(x, self.q_ids, cells)

    def add_k(self, x: Shaped[Tensor, "b hkv n d"], cells: Shaped[Tensor, "c0 b h c1 tk d"]) -> None:
        """Add key rows, in place; heads that share a key head are summed."""
        self._add(x, self.k_ids, cells)

    def view(self, n_q: int, n_k: int, device: torch.device) -> CellView:
        """Return the item as tensors."""
        dim = 3 if self.static else 2
        return CellView(self.q_ids.unsqueeze(dim), self.k_ids.unsqueeze(dim), self.mask, False, self.static)

    def _rows(self, x: Tensor, ids: Tensor, heads: int) -> Int[Tensor, "rows"]:
        """Return positions in `x.view(b * hkv * n, d)`, ordered (b, h, c, t); absent ones are -1."""
        b, hkv, n, _ = x.shape
        batch = torch.arange(b, device=ids.device).view(b, 1, 1, 1) * (hkv * n)
        head = torch.arange(heads, device=ids.device).div(heads // hkv, rounding_mode="floor") * n
        rows = torch.where(ids < 0, -1, ids + (batch + head.view(1, heads, 1, 1)))
        return rows.reshape(-1)

    def _take(self, x: Tensor, ids: Tensor, heads: int) -> Tensor:
        b, c, t, d = x.shape[0], ids.shape[2], ids.shape[3], x.shape[3]
        if self.static:
            rows = x.index_select(2, ids.reshape(-1).clamp_min(0))
            return rows.view(b, x.shape[1], c, 1, t, d).permute(2, 0, 1, 3, 4, 5)
        rows = x.reshape(-1, d).index_select(0, self._rows(x, ids, heads).clamp_min(0))
        return rows.view(1, b, heads, c, t, d)

    def _flat(self, cells: Tensor) -> Tensor:
        if self.static:
            cells = cells.permute(3, 1, 2, 0, 4, 5)
        return cells.reshape(-1, cells.shape[-1])

    def _add(self, x: Tensor, ids: Tensor, cells: Tensor) -> None:
        if self.static:
            # The cells come as (c, b, h, 1, t, d); rows of absent ids are added as zeros.
            rows = cells[:, :, :, 0].permute(1, 2, 0, 3, 4).flatten(2, 3)
            flat = ids.reshape(-1)
            rows = rows.masked_fill((flat < 0).unsqueeze(-1), 0)
            x.index_add_(2, flat.clamp_min(0), rows.to(x.dtype))
            return
        # The backward of an embedding is a row-wise scatter-add that runs in parallel and in a fixed order.
        rows = self._rows(x, ids, cells.shape[2])
        total = x.shape[0] * x.shape[1] * x.shape[2]
        grad = torch.ops.aten.embedding_dense_backward(self._flat(cells).to(x.dtype), rows, total, -1, False)
        x += grad.view(x.shape)


Item = BoxItem | IndexItem


def fold_heads(cells: Float[Tensor, "c0 b h c1 t d"], groups: int) -> Float[Tensor, "x y gt d"]:
    """Merge `(b, h, c1)`, the `groups` query heads of one key head standing below one another."""
    c0, b, h, c1, t, d = cells.shape
    if groups == 1:
        return cells.reshape(c0, b * h * c1, t, d)
    cells = cells.unflatten(2, (h // groups, groups)).transpose(3, 4)
    return cells.reshape(c0, b * (h // groups) * c1, groups * t, d)


def unfold_heads(
    x: Float[Tensor, "x y gt d"], groups: int, b: int, h: int, c1: int
) -> Float[Tensor, "c0 b h c1 t d"]:
    """Undo `fold_heads`."""
    c0, _, rows, d = x.shape
    if groups == 1:
        return x.reshape(c0, b, h, c1, rows, d)
    x = x.reshape(c0, b, h // groups, c1, groups, rows // groups, d)
    return x.transpose(3, 4).reshape(c0, b, h, c1, rows // groups, d)
