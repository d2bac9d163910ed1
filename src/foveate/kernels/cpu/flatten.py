"""A Schedule as the flat arrays the core walks, checked before raw pointers are made of them.

A cell has at most 64 *own* rows, which lie in vector lanes, and *other* rows, which stream past them in runs of
consecutive ids. Larger cells are cut. Absent ids are dropped, other rows that no own row sees too, and a mask is
one 64-bit word per other row, bit i for own row i. Forward and d_q take the schedule as it is (own = queries), d_k
and d_v its transpose (own = keys). Closed forms are flattened by array operations, cells that list their ids by the
core itself: routed cells are new in every call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import UnsupportedError, bad
from foveate.kernels.cpu.library import FLATTEN, TRANSPOSE, CellsArg, IdsArg, library
from foveate.patterns.bits import BitGroup, low_bits
from foveate.patterns.boxes import AxisClass, BoxGroup
from foveate.patterns.groups import ExplicitGroup, runs_of
from foveate.patterns.schedule import Schedule
from foveate.patterns.validate import check_group

LANES = 64


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


def flatten(schedule: Schedule) -> tuple[Flat, Facts, bool]:
    """Return the cells of a schedule as flat arrays, and whether each own row stands in one cell at most.

    Raises:
        ArgumentError: if an id lies outside of the schedule's lengths.
        UnsupportedError: if there is not enough memory.
    """
    lead_b, lead_h = schedule.leading
    small = [isinstance(g, BoxGroup) and g.tq <= LANES for g in schedule.groups]
    if (lead_b, lead_h) == (1, 1) and all(small):
        for index, group in enumerate(schedule.groups):
            check_group(group, f"groups[{index}]", schedule.n_q, schedule.n_k)
        flat = _joined([_box(group) for group in schedule.groups])  # type: ignore[arg-type]
        single = schedule.product is not None or flat.own.unique().numel() == flat.own.numel()
    else:
        flat, single = _worded(schedule) or _listed(schedule)
    facts = _facts(flat, lead_b, lead_h, schedule.n_q)
    check(flat, facts, schedule.n_q, schedule.n_k, lead_b, lead_h)
    return flat, facts, single


def transposed(flat: Flat, facts: Facts, n_other: int) -> tuple[Flat, Facts]:
    """Return the same pairs in cells that own what was streamed: each other row in one cell at most.

    Args:
        flat: checked cells.
        facts: what is known about them.
        n_other: number of other rows.

    Raises:
        UnsupportedError: if there is not enough memory.
    """
    sets = facts.lead_b * facts.lead_h
    threads = torch.get_num_threads()
    made = library().make(TRANSPOSE, argument(flat, facts), sets, n_other, threads)
    new = _taken(*made, sets)
    return new, _facts(new, facts.lead_b, facts.lead_h, n_other)


def argument(flat: Flat, facts: Facts) -> CellsArg:
    """Return the core's struct of flattened cells; it points into their tensors."""
    stride_h = 1 if facts.lead_h > 1 else 0
    stride_b = facts.lead_h if facts.lead_b > 1 else 0
    return CellsArg(
        flat.set_ptr.data_ptr(), stride_b, stride_h, flat.own_ptr.data_ptr(), flat.own.data_ptr(),
        flat.run_ptr.data_ptr(), flat.runs.data_ptr(), flat.mask_ptr.data_ptr(), flat.masks.data_ptr(),
    )  # fmt: skip


def _facts(flat: Flat, lead_b: int, lead_h: int, n_own: int) -> Facts:
    # Own rows differ within a set, so that they cover it when there are as many as rows.
    covers = flat.own.numel() == lead_b * lead_h * n_own
    cells = int(flat.set_ptr.diff().max()) if lead_b * lead_h else 0
    return Facts(lead_b, lead_h, int(covers), cells)


# ---- cells that list their ids ------------------------------------------------------------------------------------


def _worded(schedule: Schedule) -> tuple[Flat, bool] | None:
    """Flatten cells that all have words instead of masks, None for others."""
    from foveate.kernels.cpu.words import flatten_words  # which makes a `Flat`

    groups = [group for group in schedule.groups if isinstance(group, BitGroup)]
    if not groups or len(groups) < len(schedule.groups) or 0 in schedule.leading:
        return None
    return flatten_words(groups, schedule.leading, schedule.n_q)


def _listed(schedule: Schedule) -> tuple[Flat, bool]:
    groups, (lead_b, lead_h) = schedule.groups, schedule.leading
    ids = (IdsArg * len(groups))()
    alive = []  # the tensors that `ids` points into
    for at, group in enumerate(groups):
        own, other = group.q_ids(), group.k_ids()
        mask = group.allowed if isinstance(group, ExplicitGroup) else group.mask()
        alive.append((own, other, mask))
        ids[at] = IdsArg(own=own.data_ptr(), other=other.data_ptr(), cells=own.shape[2])
        ids[at].n_own, ids[at].n_other = own.shape[3], other.shape[3]
        ids[at].own_stride, ids[at].other_stride = _strides(own), _strides(other)
        if mask is not None:
            ids[at].mask, ids[at].mask_stride = mask.data_ptr(), _strides(mask)
    lengths = len(groups), lead_b, lead_h, schedule.n_q, schedule.n_k
    made, sizes = library().make(FLATTEN, ids, *lengths, torch.get_num_threads())
    if sizes[4]:
        for index, group in enumerate(groups):
            check_group(group, f"groups[{index}]", schedule.n_q, schedule.n_k)
    return _taken(made, sizes, lead_b * lead_h), bool(sizes[5])


def _strides(x: Tensor) -> ctypes.Array:
    """Return the strides, 0 for dimensions of size 1, which broadcast."""
    return (ctypes.c_int64 * x.ndim)(*(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True)))


def _taken(made: int | None, sizes: Sequence[int], sets: int) -> Flat:
    """Copy out what the core made."""
    if made is None:
        raise UnsupportedError("backend 'cpu': there is no memory left to flatten the cells.")
    cells, own, runs, words = sizes[:4]
    flat = Flat(
        torch.empty(sets + 1, dtype=torch.int64),
        torch.empty(cells + 1, dtype=torch.int64),
        torch.empty(own, dtype=torch.int32),
        torch.empty(cells + 1, dtype=torch.int64),
        torch.empty(runs, 2, dtype=torch.int32),
        torch.empty(cells, dtype=torch.int64),
        torch.empty(words, dtype=torch.int64),
    )
    library().handle.fv_flat_take(made, *(x.data_ptr() for x in flat))
    return flat


# ---- closed forms -------------------------------------------------------------------------------------------------


def _box(group: BoxGroup) -> Flat:
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
        full = (words == low_bits(torch.tensor(group.tq))).all(1)
        mask_at = torch.where(full[index], -1, index * group.tk * 8)
    own_ptr, run_ptr = (torch.arange(cells + 1) * n for n in (group.tq, runs.shape[1]))
    both = torch.tensor([0, cells])
    return Flat(both, own_ptr, own.flatten(), run_ptr, runs.flatten(0, 1), mask_at, masks.contiguous())


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
    return F.pad(total, (group.lead, 0), value=int(low_bits(torch.tensor(group.tq))))


def _axis_words(axis: AxisClass) -> Int[Tensor, "v k"]:
    """Return the words of one axis: bit i of word t is set where first[i] <= t < last[i]."""
    bits = (torch.ones((), dtype=torch.int64) << torch.arange(axis.q_count)).expand(axis.first.shape)
    last = torch.maximum(axis.first, axis.last)
    # Every bit is added once and taken away once: sums never carry, and int64 wraps around at the last bit.
    steps = torch.zeros(axis.n_variants, axis.k_count + 1, dtype=torch.int64)
    steps.scatter_add_(1, axis.first, bits).scatter_add_(1, last, -bits)
    return steps.cumsum(1)[:, :-1]


def _joined(parts: Sequence[Flat]) -> Flat:
    """Put the cells of one set together."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Flat(
            torch.zeros(2).long(),
            none.new_zeros(1),
            none.int(),
            none.new_zeros(1),
            none.int().view(0, 2),
            none,
            none,
        )
    mask_ptr, before = [], 0
    for part in parts:
        mask_ptr.append(torch.where(part.mask_ptr < 0, -1, part.mask_ptr + before))
        before += 8 * part.masks.numel()
    own_ptr, run_ptr = (
        F.pad(torch.cat([p.diff() for p in pointers]).cumsum(0), (1, 0))
        for pointers in ([p.own_ptr for p in parts], [p.run_ptr for p in parts])
    )
    joined = torch.cat(mask_ptr)
    return Flat(
        torch.tensor([0, joined.numel()]), own_ptr, torch.cat([p.own for p in parts]), run_ptr,
        torch.cat([p.runs for p in parts]), joined, torch.cat([p.masks for p in parts]),
    )  # fmt: skip


# ---- checks -------------------------------------------------------------------------------------------------------


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
