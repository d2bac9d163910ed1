"""A Schedule as the flat arrays the core walks: `flatten`, all of it array operations.

A cell has at most 64 *own* rows, which lie in vector lanes, and *other* rows, which stream past them in runs of
consecutive ids. Larger cells are cut. Absent ids are dropped, other rows that no own row sees too, and a mask is
one 64-bit word per other row, bit i for own row i. Forward and d_q take the schedule as it is (own = queries), d_k
and d_v its transpose (own = keys).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.boxes import AxisClass, BoxGroup
from foveate.patterns.groups import CellGroup, ExplicitGroup, pack_bits, runs_of
from foveate.patterns.schedule import Schedule
from foveate.patterns.validate import check_group

LANES = 64
# Mask entries packed at a time.
_CHUNK = 1 << 24


class Flat(NamedTuple):
    """Flattened cells. Set s, one or one per (batch, head), owns the cells set_ptr[s] .. set_ptr[s + 1] - 1."""

    set_ptr: Int[Tensor, "s1"]
    own_ptr: Int[Tensor, "c1"]
    own: Int[Tensor, "rows"]
    run_ptr: Int[Tensor, "c1"]
    runs: Int[Tensor, "r 2"]
    mask_ptr: Int[Tensor, "c"]
    masks: Int[Tensor, "words"]


class Facts(NamedTuple):
    """What must be known about flattened cells without looking into them.

    Attributes:
        lead_b: batches that are told apart, 1 when they share the cells.
        lead_h: heads that are told apart.
        covers: whether every row is owned by some cell, so that nothing must be zeroed first.
        cells: cells of the largest set.
    """

    lead_b: int
    lead_h: int
    covers: int
    cells: int


class _Part(NamedTuple):
    """The cells of one group: counts per cell (leads slowest), and what they count, one after the other."""

    leads: int
    own_count: Tensor
    own: Tensor
    run_count: Tensor
    runs: Tensor
    mask_at: Tensor
    masks: Tensor


def flatten(schedule: Schedule) -> tuple[Flat, Facts]:
    """Return the cells of a schedule as flat arrays.

    Raises:
        ArgumentError: if an id lies outside of the schedule's lengths.
    """
    n_own, n_other = schedule.n_q, schedule.n_k
    for index, group in enumerate(schedule.groups):
        check_group(group, f"groups[{index}]", n_own, n_other)
    lead_b, lead_h = schedule.leading
    leads = lead_b * lead_h
    parts = [
        _box(group) if leads == 1 and isinstance(group, BoxGroup) and group.tq <= LANES
        else _explicit(group, (lead_b, lead_h))
        for group in schedule.groups
    ]  # fmt: skip
    flat = _join(parts, leads)
    per_set = flat.own_ptr[flat.set_ptr].diff()
    covers = int(bool((per_set == n_own).all()))
    cells = int(flat.set_ptr.diff().max()) if leads else 0
    facts = Facts(lead_b, lead_h, covers, cells)
    check(flat, facts, n_own, n_other, lead_b, lead_h)
    return flat, facts


# ---- groups -----------------------------------------------------------------------------------------------------


def _box(group: BoxGroup) -> _Part:
    """Flatten a closed form: ids are materialised, masks are stored once for all cells that share them."""
    cells, lead = group.n_cells, group.lead
    own = group.q_bases().int()[:, None] + group.q_offsets().int()
    offset, length, _ = runs_of(group.k_offsets())
    runs = torch.empty(cells, int(lead > 0) + offset.numel(), 2, dtype=torch.int32)
    runs[:, 0] = torch.tensor([0, lead], dtype=torch.int32)
    torch.add(group.k_bases().int()[:, None], offset.int(), out=runs[:, int(lead > 0) :, 0])
    runs[:, int(lead > 0) :, 1] = length.int()
    masks, mask_at = torch.zeros(0, dtype=torch.int64), torch.full((cells,), -1)
    index = group.mask_index()
    if index is not None:
        words = _box_words(group)
        masks = words.reshape(-1)
        full = (words == _low_bits(torch.tensor(group.tq))).all(1)
        mask_at = torch.where(full[index], -1, index * group.tk)
    count = torch.full((cells,), group.tq), torch.full((cells,), runs.shape[1])
    return _Part(1, count[0], own.flatten(), count[1], runs.flatten(0, 1), mask_at, masks)


def _box_words(group: BoxGroup) -> Int[Tensor, "v tk"]:
    """Return the words of the distinct masks of a group, in the order of its `mask_variants`."""
    total, rows = torch.ones(1, 1, dtype=torch.int64), 1
    for axis in group.axes:
        words = _axis_words(axis)
        joined = torch.zeros(len(total), len(words), total.shape[1], words.shape[1], dtype=torch.int64)
        for row in range(rows):
            seen = (total >> row & 1)[:, None, :, None]
            joined |= seen * (words << row * axis.q_count)[None, :, None, :]
        total, rows = joined.flatten(2).flatten(0, 1), rows * axis.q_count
    return F.pad(total, (group.lead, 0), value=int(_low_bits(torch.tensor(group.tq))))


def _axis_words(axis: AxisClass) -> Int[Tensor, "v k"]:
    """Return the words of one axis: bit i of word t is set where first[i] <= t < last[i]."""
    bits = (torch.ones((), dtype=torch.int64) << torch.arange(axis.q_count)).expand(axis.first.shape)
    last = torch.maximum(axis.first, axis.last)
    # Every bit is added once and taken away once: sums never carry, and int64 wraps around at the last bit.
    steps = torch.zeros(axis.n_variants, axis.k_count + 1, dtype=torch.int64)
    steps.scatter_add_(1, axis.first, bits).scatter_add_(1, last, -bits)
    return steps.cumsum(1)[:, :-1]


def _explicit(group: CellGroup, leading: tuple[int, int]) -> _Part:
    """Flatten cells that list their ids."""
    allowed = group.allowed if isinstance(group, ExplicitGroup) else group.mask()
    own, other, allowed = _cut(group.q_ids(), group.k_ids(), allowed)
    own, other = (x.expand(*leading, *x.shape[2:]).flatten(0, 1) for x in (own, other))
    leads, cells, width = other.shape
    present = own >= 0
    own_count = present.sum(-1)
    needed, words, full, shared = other >= 0, None, None, False
    if allowed is not None:
        if not bool(present.all()):
            order = (~present).long().argsort(dim=-1, stable=True).view(*leading, cells, own.shape[2])
            allowed = allowed.expand(*leading, cells, own.shape[2], width).gather(
                3, order.unsqueeze(-1).expand(*order.shape, width)
            )
        alone = allowed.shape[:3] == (1, 1, 1)
        if not alone:
            allowed = allowed.expand(*leading, *allowed.shape[2:])
        words = _words(allowed.flatten(0, 1).expand(-1, -1, own.shape[2], width)).expand(leads, cells, width)
        seen = _low_bits(own_count).unsqueeze(-1)
        words = words & seen
        shared = alone and bool(needed.all()) and bool((own_count == own.shape[2]).all())
        needed = needed & (words != 0) if not shared else needed
        full = ((words == seen) | ~needed).all(-1).flatten()
    needed = needed & (own_count > 0).unsqueeze(-1)
    run_count, runs = _runs(other, needed)
    mask_at, masks = torch.full((leads * cells,), -1), torch.zeros(0, dtype=torch.int64)
    if words is not None and full is not None and shared:
        masks = words[0, 0].contiguous() if leads * cells else masks
        mask_at = full.long().neg()
    elif words is not None and full is not None:
        partial = needed & ~full.view(leads, cells, 1)
        masks = words[partial]
        count = partial.sum(-1).flatten()
        mask_at = torch.where(full, -1, count.cumsum(0) - count)
    return _Part(leads, own_count.flatten(), own[present].int(), run_count, runs, mask_at, masks)


def _cut(
    own: Int[Tensor, "b h c tq"], other: Int[Tensor, "b h c tk"], allowed: Bool[Tensor, "..."] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut cells of more than LANES own rows; the parts have the same other rows."""
    tq = own.shape[3]
    if tq <= LANES:
        return own, other, allowed
    pieces = -(-tq // LANES)
    rest = pieces * LANES - tq
    own = F.pad(own, (0, rest), value=-1).unflatten(3, (pieces, LANES)).flatten(2, 3)
    other = other.repeat_interleave(pieces, dim=2)
    if allowed is not None and allowed.shape[3] > 1:
        allowed = F.pad(allowed, (0, 0, 0, rest)).unflatten(3, (pieces, LANES)).flatten(2, 3)
        if allowed.shape[2] == pieces and own.shape[2] != pieces:  # one mask for all cells
            allowed = allowed.repeat(1, 1, own.shape[2] // pieces, 1, 1)
    elif allowed is not None and allowed.shape[2] > 1:
        allowed = allowed.repeat_interleave(pieces, dim=2)
    return own, other, allowed


def _words(mask: Bool[Tensor, "*lead tq tk"]) -> Int[Tensor, "*lead tk"]:
    """Pack the own rows of every other row into one 64-bit word."""
    *lead, tq, tk = mask.shape
    flat = mask.reshape(-1, tq, tk).transpose(1, 2)
    step = max(1, _CHUNK // max(LANES * tk, 1))
    parts = [pack_bits(F.pad(part, (0, LANES - tq))) for part in flat.split(step)]
    return torch.cat(parts).view(torch.int64).view(*lead, tk)


def _low_bits(count: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Return words whose `count` lowest bits are set, 0 <= count <= 64."""
    shift = torch.ones_like(count) << count.clamp(max=62)
    words = shift - 1
    words = torch.where(count == 63, (1 << 63) - 1, words)
    return torch.where(count == 64, -1, words)


def _runs(ids: Int[Tensor, "l c tk"], needed: Bool[Tensor, "l c tk"]) -> tuple[Tensor, Tensor]:
    """Return the number of runs of every cell, and (start, length) of all of them."""
    leads, cells, width = ids.shape
    at = needed.reshape(-1).nonzero().flatten()
    ids = ids.reshape(-1)[at]
    cell = at // max(width, 1)
    begins = torch.ones_like(at, dtype=torch.bool)
    begins[1:] = (ids[1:] != ids[:-1] + 1) | (cell[1:] != cell[:-1])
    first = begins.nonzero().flatten()
    length = first.diff(append=torch.tensor([at.numel()]))
    count = torch.bincount(cell[first], minlength=leads * cells)
    return count, torch.stack([ids[first], length], dim=1).int()


# ---- together ---------------------------------------------------------------------------------------------------


def _join(parts: list[_Part], leads: int) -> Flat:
    """Put the cells of all groups together, those of one set side by side."""
    none = torch.zeros(0, dtype=torch.int64)
    own_count = torch.cat([none, *(p.own_count for p in parts)])
    run_count = torch.cat([none, *(p.run_count for p in parts)])
    own = torch.cat([none.int(), *(p.own for p in parts)])
    runs = torch.cat([none.int().view(0, 2), *(p.runs for p in parts)])
    masks = torch.cat([none, *(p.masks for p in parts)])
    mask_at, before = [none], 0
    for part in parts:
        mask_at.append(torch.where(part.mask_at < 0, -1, (part.mask_at + before) * 8))
        before += part.masks.numel()
    mask_ptr = torch.cat(mask_at)
    per_lead = [p.own_count.numel() // max(p.leads, 1) for p in parts]
    if leads > 1 and len(parts) > 1:
        lead = torch.cat([torch.arange(leads).repeat_interleave(n) for n in per_lead])
        order = lead.argsort(stable=True)
        own, runs = _reordered(own, own_count, order), _reordered(runs, run_count, order)
        own_count, run_count, mask_ptr = own_count[order], run_count[order], mask_ptr[order]
    return Flat(
        torch.arange(leads + 1) * sum(per_lead), _ptr(own_count), own, _ptr(run_count), runs.contiguous(),
        mask_ptr, masks,
    )  # fmt: skip


def _ptr(count: Int[Tensor, "c"]) -> Int[Tensor, "c1"]:
    return F.pad(count.cumsum(0), (1, 0))


def _reordered(rows: Tensor, count: Int[Tensor, "c"], order: Int[Tensor, "c"]) -> Tensor:
    """Reorder cells of `count` rows each."""
    first, count = (count.cumsum(0) - count)[order], count[order]
    shift = first - (count.cumsum(0) - count)
    return rows[shift.repeat_interleave(count) + torch.arange(rows.shape[0])]


def check(flat: Flat, facts: Facts, n_own: int, n_other: int, batch: int, heads: int) -> None:
    """The last look before raw pointers are handed out: every position and id lies within its tensor.

    Raises:
        ArgumentError: naming the array.
    """
    kinds = (torch.int64, torch.int64, torch.int32, torch.int64, torch.int32, torch.int64, torch.int64)
    for name, x, kind in zip(Flat._fields, flat, kinds, strict=True):
        if x.dtype != kind or not x.is_contiguous() or x.device.type != "cpu":
            raise bad(f"cells.{name}", (x.dtype, x.stride(), str(x.device)), f"contiguous {kind} on the CPU")
    cells, sets = flat.mask_ptr.numel(), facts.lead_b * facts.lead_h
    if facts.lead_b not in (1, batch) or facts.lead_h not in (1, heads) or flat.set_ptr.numel() != sets + 1:
        raise bad("cells", facts, f"cells for (1 or {batch}, 1 or {heads}) batches and heads")
    _pointers("set_ptr", flat.set_ptr, sets, cells, cells)
    _pointers("own_ptr", flat.own_ptr, cells, flat.own.numel(), LANES)
    _pointers("run_ptr", flat.run_ptr, cells, len(flat.runs), len(flat.runs))
    start, length = flat.runs.unbind(1)
    _within("own", flat.own, flat.own, n_own - 1)
    _within("runs", length, length, n_other)
    _within("runs", start, start.long() + length if n_other > 1 << 30 else start + length, n_other)
    if not cells or int(flat.mask_ptr.max()) < 0:
        return
    ends = F.pad(length.cumsum(0), (1, 0))[flat.run_ptr]
    masked = flat.mask_ptr >= 0
    _within("masks", flat.mask_ptr[masked], (flat.mask_ptr + 8 * ends.diff())[masked], 8 * flat.masks.numel())


def _pointers(name: str, ptr: Int[Tensor, "n1"], n: int, total: int, most: int) -> None:
    step = ptr.diff()
    ok = ptr.numel() == n + 1 and int(ptr[0]) == 0 and int(ptr[-1]) == total
    if not ok or (n and (int(step.min()) < 0 or int(step.max()) > most)):
        raise bad(
            f"cells.{name}", tuple(ptr.shape), f"{n + 1} rising positions from 0 to {total}, steps <= {most}"
        )


def _within(name: str, low: Int[Tensor, "n"], high: Int[Tensor, "n"], last: int) -> None:
    if low.numel() and (int(low.min()) < 0 or int(high.max()) > last):
        raise bad(f"cells.{name}", f"{int(low.min())}..{int(high.max())}", f"ids within 0..{last}")
