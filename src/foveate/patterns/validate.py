"""The checks behind `Schedule.validate` and `Schedule.is_single_cell`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import ArgumentError, bad
from foveate.patterns.boxes import BoxGroup
from foveate.patterns.groups import CellGroup

# Ids materialised at a time while checking.
_CHUNK = 1 << 22


def check_combine(combine: Any, mean: type, weights: type, groups: Sequence[CellGroup] | None = None) -> None:
    """Raise an ArgumentError naming `combine` unless it is one of the four ways, of matching shapes."""
    if not (isinstance(combine, (mean, weights)) or combine in ("lse", "sum")):
        raise bad("combine", combine, "'lse', 'sum', Mean(eps) or Weights(tensor)")
    if not isinstance(combine, weights) or groups is None:
        return
    tensors = combine.weights  # type: ignore[attr-defined]
    if len(tensors) != len(groups):
        raise bad("combine", f"{len(tensors)} tensors of weights", f"{len(groups)}, one per group of cells")
    for index, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
        shape = tuple(tensor.shape)
        cells = (group.n_cells, group.tq)
        if len(shape) != 4 or any(s not in (1, c) for s, c in zip(shape[2:], cells, strict=True)):
            raise bad(f"combine.weights[{index}]", shape, f"a shape that broadcasts to (B, H, {cells})")


def check_group(group: CellGroup, name: str, n_q: int, n_k: int) -> None:
    """Raise an ArgumentError when the group holds an id outside [-1, n)."""
    if isinstance(group, BoxGroup):
        _check_box(group, name, n_q, n_k)
        return
    _check_range(group.q_ids(), f"{name}.q_ids", n_q, "n_q")
    _check_range(group.k_ids(), f"{name}.k_ids", n_k, "n_k")


def _check_range(ids: Tensor, name: str, n: int, length: str) -> None:
    wrong = (ids < -1) | (ids >= n)
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise bad(f"{name}{list(where)}", int(ids[where]), f"an id below {length}={n}, or -1 for absent")


def _check_box(group: BoxGroup, name: str, n_q: int, n_k: int) -> None:
    for axis, c in enumerate(group.axes):
        sides = (
            ("q", c.q_starts, c.q_step, c.q_count, group.q_sizes[axis]),
            ("k", c.k_starts, c.k_step, c.k_count, group.k_sizes[axis]),
        )
        for side, starts, step, count, size in sides:
            if not count or not starts.numel():
                continue
            low, high = int(starts.min()), int(starts.max()) + step * (count - 1)
            if low < 0 or high >= size:
                got, want = f"positions {low}..{high}", f"positions within 0..{size - 1}"
                raise bad(f"{name}.axes[{axis}].{side}_starts", got, want)
        if bool(((c.last > c.first) & ((c.first < 0) | (c.last > c.k_count))).any()):
            raise bad(f"{name}.axes[{axis}].first/last", "columns outside the key box", f"0..{c.k_count}")
    if group.tq and group.n_cells:
        for side, ids, n in (("q", group.q_bases() + group.q_offsets().max(), n_q),):
            if int(ids.max()) >= n:
                raise bad(f"{name}.{side}_offset", int(ids.max()), f"ids below n_{side}={n}")
        if group.tk > group.lead:
            last = int((group.k_bases() + group.k_offsets().max()).max())
            if last >= n_k:
                raise bad(f"{name}.k_offset", last, f"ids below n_k={n_k}")
    if group.lead > n_k:
        raise bad(f"{name}.lead", group.lead, f"at most n_k={n_k} leading keys")


def stands_once(groups: Sequence[CellGroup], n_q: int, leading: tuple[int, int]) -> bool:
    """Say whether no query id occurs twice, in any batch and head."""
    b, h = leading
    count = None
    for group in groups:
        step = max(1, _CHUNK // max(b * h * group.tq, 1))
        for lo in range(0, group.n_cells, step):
            ids = group.q_ids(lo, lo + step)
            flat = ids.expand(b, h, *ids.shape[2:]).flatten(2)
            if count is None:
                count = torch.zeros(b, h, n_q + 1, dtype=torch.int32, device=ids.device)
            # Absent ids are counted in a spare place at the end.
            at = torch.where(flat < 0, n_q, flat)
            count.scatter_add_(2, at, torch.ones_like(at, dtype=torch.int32))
    return count is None or not bool((count[..., :n_q] > 1).any())


def _keys_distinct(group: CellGroup) -> bool:
    """Say whether no cell of the group lists a key twice."""
    if isinstance(group, BoxGroup):
        # The grid's keys stand behind the leading ones.
        return group.k_offset >= group.lead
    keys = group.k_ids().sort(-1).values
    return not bool(((keys[..., 1:] == keys[..., :-1]) & (keys[..., 1:] >= 0)).any())


def check_disjoint(groups: Sequence[CellGroup], n_q: int, n_k: int, leading: tuple[int, int]) -> None:
    """Raise an ArgumentError naming the first pair of query and key that cells let through twice."""
    if all(_keys_distinct(g) for g in groups) and stands_once(groups, n_q, leading):
        return
    for b in range(leading[0]):
        for h in range(leading[1]):
            codes = [_pairs(group, n_k, b, h) for group in groups]
            codes = torch.cat(codes).sort().values if codes else torch.zeros(0, dtype=torch.int64)
            twice = codes[1:][codes[1:] == codes[:-1]]
            if twice.numel():
                raise _overlap(int(twice[0]) // n_k, int(twice[0]) % n_k, b, h)


def _overlap(q: int, k: int, b: int, h: int) -> ArgumentError:
    hint = "Remove the overlap, or combine with 'sum', Mean or Weights."
    return bad(
        "groups", f"key {k} twice for query {q} (b={b}, h={h})", "disjoint keys with combine='lse'", hint
    )


def _pairs(group: CellGroup, n_k: int, b: int, h: int) -> Tensor:
    """Return q * n_k + k of every pair that the group lets through for one batch and head."""
    q, k, mask = group.q_ids(), group.k_ids(), group.mask()
    q, k = (
        q[min(b, q.shape[0] - 1), min(h, q.shape[1] - 1)],
        k[min(b, k.shape[0] - 1), min(h, k.shape[1] - 1)],
    )
    codes = q[:, :, None] * n_k + k[:, None, :]
    if mask is None:
        return codes.reshape(-1)
    mask = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)]
    return codes[mask.expand(codes.shape)]
