"""A Schedule made ready to run: a flat `Program` of items, each able to gather and scatter its cells.

An item is either a pair of boxes (views of a grid, `boxes.py`) or two tables of ids. Programs are integers and
index tensors only, so they pass through torch.library operators, torch.compile and torch.export as constants.

Gathered cells have the layout `(c0, b, h, c1, t, d)` of `boxes.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from foveate.kernels.boxes import Box, Run, pair_runs, read_box
from foveate.patterns.boxes import AxisClass, BoxGroup
from foveate.patterns.groups import CellGroup, ExplicitGroup
from foveate.patterns.schedule import Schedule, Weights

# A class of tiles is cut into one item per distinct mask as long as that makes no more items than this;
# beyond it the masks are stored per cell, which costs memory instead of calls.
MAX_ITEMS = 64


class CellView(NamedTuple):
    """One item as tensors, for code that forms logits: ids with cells along (c0, c1), and what they have in common.

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


class Program(NamedTuple):
    """A Schedule as plain integers and tensors.

    Attributes:
        code: the items, see `_encode`.
        tensors: ids and masks the code refers to by position.
        n_items: number of items.
    """

    code: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    n_items: int

    def items(self) -> tuple[Item, ...]:
        """Rebuild the items."""
        return read_items(self.code, self.tensors)


def read_items(code: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Item, ...]:
    """Rebuild the items of a program."""
    out: list[Item] = []
    for kind, mask_at, a, b in _decode(tuple(code)):
        mask = None if mask_at < 0 else tensors[mask_at]
        out.append(BoxItem(a, b, mask) if kind == 0 else IndexItem(tensors[a], tensors[b], mask))
    return tuple(out)


@lru_cache(maxsize=64)
def _decode(code: tuple[int, ...]) -> tuple:
    out, at = [], 0
    while at < len(code):
        kind, mask_at = code[at : at + 2]
        at += 2
        if kind == 0:
            q, at = read_box(code, at)
            k, at = read_box(code, at)
            out.append((0, mask_at, q, k))
        else:
            out.append((1, mask_at, code[at], code[at + 1]))
            at += 2
    return tuple(out)


def _encode(items: Sequence[Item]) -> Program:
    code: list[int] = []
    tensors: list[Tensor] = []

    def store(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor)
        return len(tensors) - 1

    for item in items:
        if isinstance(item, BoxItem):
            code += [0, store(item.mask), *item.q.ints(), *item.k.ints()]
        else:
            code += [1, store(item.mask), store(item.q_ids), store(item.k_ids)]
    return Program(tuple(code), tuple(tensors), len(items))


def program(schedule: Schedule, device: torch.device) -> Program:
    """Return the program of a schedule on a device; kept as long as the schedule lives."""

    def make() -> Program:
        groups = schedule.groups
        if isinstance(schedule.combine, Weights):
            # Their tensors follow the cells of each group: one item a group, in its own order.
            groups = tuple(
                ExplicitGroup(g.q_ids(), g.k_ids(), g.mask()) if isinstance(g, BoxGroup) else g
                for g in groups
            )
        return _encode([item for group in groups for item in items_of(group, device)])

    return schedule.memo(("tiles", str(device)), make)


def views(schedule: Schedule, device: torch.device) -> tuple[CellView, ...]:
    """Return the items of `program(schedule, device)` as tensors; kept as long as the schedule lives."""

    def make() -> tuple[CellView, ...]:
        items = program(schedule, device).items()
        return tuple(item.view(schedule.n_q, schedule.n_k, device) for item in items)

    return schedule.memo(("tiles views", str(device)), make)


def items_of(group: CellGroup, device: torch.device) -> list[Item]:
    """Cut one group into items; groups without cells, queries or keys give none."""
    if not (group.n_cells and group.tq and group.tk):
        return []
    if isinstance(group, BoxGroup):
        return _box_items(group, device)
    mask = group.mask()
    q_ids, k_ids = group.q_ids().to(device), group.k_ids().to(device)
    if mask is not None:
        static = q_ids.shape[:2] == (1, 1) and k_ids.shape[:2] == (1, 1)
        mask = mask.to(device).unsqueeze(3 if static else 2)
        if static and mask.shape[:2] != (1, 1):  # masks per head over shared ids: give the ids heads too
            q_ids = q_ids.expand(*mask.shape[:2], -1, -1)
            k_ids = k_ids.expand(*mask.shape[:2], -1, -1)
            mask = mask.squeeze(3).unsqueeze(2)
    return [IndexItem(q_ids, k_ids, mask)]


class _AxisPart(NamedTuple):
    q: Run
    k: Run
    tiles: list[int]  # tile numbers, outer-major


def _box_items(group: BoxGroup, device: torch.device) -> list[Item]:
    split = [_axis_parts(axis, by_variant=True) for axis in group.axes]
    if math.prod(len(parts) for parts in split) > MAX_ITEMS:
        split = [_axis_parts(axis, by_variant=False) for axis in group.axes]
    items: list[Item] = []
    for parts in itertools.product(*split):
        q = Box(group.q_sizes, tuple(p.q for p in parts), group.q_offset)
        k = Box(group.k_sizes, tuple(p.k for p in parts), group.k_offset, group.lead)
        mask = None if group.is_full else _box_mask(group, parts).to(device)
        if mask is not None and bool(mask.all()):
            mask = None
        items.append(BoxItem(q, k, mask))
    return items


def _axis_parts(axis: AxisClass, *, by_variant: bool) -> list[_AxisPart]:
    q_starts, k_starts = axis.q_starts.tolist(), axis.k_starts.tolist()
    variants = [0] * len(q_starts) if axis.variant is None else axis.variant.tolist()
    tile_at = {start: tile for tile, start in enumerate(q_starts)}
    parts = []
    for variant in sorted(set(variants)) if by_variant else [None]:
        chosen = [i for i, v in enumerate(variants) if variant is None or v == variant]
        runs = pair_runs(
            [q_starts[i] for i in chosen], axis.q_step, axis.q_count,
            [k_starts[i] for i in chosen], axis.k_step, axis.k_count,
        )  # fmt: skip
        for q, k in runs:
            starts = [
                q.base + a * q.outer_step + b * q.inner_step for a in range(q.outer) for b in range(q.inner)
            ]
            parts.append(_AxisPart(q, k, [tile_at[s] for s in starts]))
    return parts


def _box_mask(group: BoxGroup, parts: Sequence[_AxisPart]) -> Bool[Tensor, "1 1 c0 c1 tq tk"]:
    """Join one mask per axis; cell dimensions stay of size 1 where all cells share a mask."""
    total = None
    for axis, part in zip(group.axes, parts, strict=True):
        variants = axis.variants(torch.tensor(part.tiles, device=axis.first.device))
        shared = bool((variants == variants[0]).all())
        shape = (1, 1) if shared else (part.q.outer, part.q.inner)
        one = axis.masks(variants[:1] if shared else variants).unflatten(0, shape)  # (outer, inner, q, k)
        if total is None:
            total = one.transpose(0, 1)  # (c0, c1, q, k)
            continue
        c0, c1, q, k = total.shape
        one = one.flatten(0, 1)
        total = total[:, :, None, :, None, :, None] & one[None, None, :, None, :, None, :]
        total = total.reshape(c0, c1 * one.shape[0], q * one.shape[1], k * one.shape[2])
    assert total is not None
    c1 = parts[0].q.outer * math.prod(p.q.cells for p in parts[1:])
    if total.shape[1] not in (1, c1):
        # Some axes share a mask and others do not: spread the former, slowest axis first.
        spread = [parts[0].q.outer, *(p.q.cells for p in parts[1:])]
        own = [1 if _shared(a, p) else n for a, p, n in zip(group.axes, parts, spread, strict=True)]
        total = total.unflatten(1, own).expand(-1, *spread, -1, -1).flatten(1, len(spread))
    if group.lead:
        total = F.pad(total, (group.lead, 0), value=True)
    return total[None, None].contiguous()


def _shared(axis: AxisClass, part: _AxisPart) -> bool:
    variants = axis.variants(torch.tensor(part.tiles, device=axis.first.device))
    return bool((variants == variants[0]).all())


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
