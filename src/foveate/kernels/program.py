"""A Schedule made ready to run: a flat `Program` of items.

Programs are integers and index tensors only, so they pass through torch.library operators, torch.compile and
torch.export as constants.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from foveate.kernels.boxes import Box, Run, pair_runs, read_box
from foveate.kernels.cells import BoxItem, CellView, IndexItem, Item
from foveate.patterns.boxes import AxisClass, BoxGroup
from foveate.patterns.groups import CellGroup, ExplicitGroup
from foveate.patterns.schedule import Schedule, Weights

# A class of tiles is cut into one item per distinct mask as long as that makes no more items than this;
# beyond it the masks are stored per cell, which costs memory instead of calls.
MAX_ITEMS = 64


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


def pairs_of(code: Sequence[int], shapes: Sequence[Sequence[int]]) -> int:
    """Return the pairs a program computes for one batch and head, from the shapes of its tensors alone."""
    total = 0
    for kind, _, a, b in _decode(tuple(code)):
        if kind == 0:
            total += a.c0 * a.c1 * a.tokens * b.tokens
        else:
            total += shapes[a][2] * shapes[a][3] * shapes[b][3]
    return total


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
        mask = None if group.is_full else _box_mask(group, parts)
        # Asked before the move: a question to another device waits for it, and meta tensors have no answer.
        if mask is not None and bool(mask.all()):
            mask = None
        items.append(BoxItem(q, k, None if mask is None else mask.to(device)))
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
