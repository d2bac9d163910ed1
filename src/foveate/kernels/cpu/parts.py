"""Queries that stand in several cells under one softmax: each cell runs by itself, and the parts are merged.

The core knows one cell per query. Cells that do not overlap could be joined to one, but where queries choose for
themselves the joined cells hold many times the pairs that were asked for. So a query is copied, once for every cell
it stands in, a stretch of queries at a time; each copy has an output and a log-sum-exp, and those are merged:

    lse = log sum_c exp(lse_c),    out = sum_c exp(lse_c - lse) out_c

Backward the weights are made from the merged lse, so that nothing is kept of the copies: the gradients of the copies
of a query add up, and keys get theirs from the queries themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from foveate.kernels.cpu.flatten import Facts, Flat
from foveate.kernels.cpu.job import (
    NEG_INF,
    Call,
    empty_like,
    forward,
    key_gradients,
    query_gradient,
    spec_of,
)
from foveate.kernels.cpu.library import SOFTMAX
from foveate.kernels.cpu.op import PLAIN
from foveate.kernels.cpu.tiling import by_key, cost, flattened
from foveate.kernels.merge import merge_shares
from foveate.kernels.problem import Problem
from foveate.patterns.schedule import Schedule
from foveate.scores.rules import Softmax

# Queries whose copies are made together, where no cell reaches from one such stretch into the next.
_STRETCH = 1024
# Own rows a cell must have on average: with fewer, lanes stay empty and joined cells are cheaper.
_FILLED = 12
# Nanoseconds per number of a copy: made, written, read, merged.
_COPY = 0.7


class Part(NamedTuple):
    """The cells of some queries of one (batch, head), over their copies.

    Attributes:
        lead: number of the (batch, head) that the schedule tells apart.
        first, last: the queries.
        width: copies of each; copy c of query i is row `(i - first) * width + c`.
        cells: flat cells of one set.
        facts: what is known about them.
    """

    lead: int
    first: int
    last: int
    width: int
    cells: Flat
    facts: Facts


def apart(problem: Problem) -> bool:
    """Say whether the cells of a problem run by themselves and are merged. Reads ids, no other tensor."""
    schedule = problem.schedule
    if schedule is None or not problem.one_rule or torch.compiler.is_compiling():
        return False
    # What watches operators (a counter of FLOPs, a tracer) should see one.
    if torch._C._len_torch_dispatch_stack() or any(
        type(x) not in PLAIN for x in (problem.q, problem.k, problem.v)
    ):
        return False
    plain = type(problem.weigh) is Softmax and problem.weigh.sink is None and problem.mask is None
    if not plain or len(problem.score) + len(problem.after):
        return False
    if 0 in (*problem.q.shape, *problem.k.shape) or schedule.product is not None:
        return False
    flat, _, single = flattened(schedule.to("cpu"))
    return not single and flat.own.numel() >= _FILLED * flat.mask_ptr.numel()


def apart_cost(schedule: Schedule, width: int) -> float:
    """Return the nanoseconds one core takes per batch and head, forward."""
    copies = sum(group.n_cells * group.tq for group in schedule.groups)
    return cost(schedule, width) + copies * width * _COPY


def attend_apart(
    problem: Problem, schedule: Schedule, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output and the lse; differentiable once with respect to q, k, v."""
    return _Apart.apply(q, k, v, schedule, problem.scale)  # type: ignore[return-value]


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float):
        out = empty_like(q, v.shape[3]).zero_()
        lse = torch.full(q.shape[:3], NEG_INF)
        for part in _parts(schedule):
            for b, h in _members(part, schedule, q):
                rows = slice(part.first, part.last)
                outs, lses = forward(_part_call(part, b, h, q, k, v, scale))
                _merge(outs[0, 0], lses[0, 0], part.width, out[b, h, rows], lse[b, h, rows])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.scale = schedule, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        schedule, scale, needs = ctx.schedule, ctx.scale, ctx.needs_input_grad
        grad = torch.zeros_like(out) if grad is None else grad if grad.stride(3) == 1 else grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).contiguous()
        if grad_lse is not None:
            delta -= grad_lse.masked_fill(lse == NEG_INF, 0.0)
        dq = dk = dv = None
        if needs[0]:
            dq = empty_like(q, q.shape[3]).zero_()
            for part in _parts(schedule):
                for b, h in _members(part, schedule, q):
                    call = _part_call(part, b, h, q, k, v, scale)
                    given = (_copied(x[b, h, part.first : part.last], part.width) for x in (grad, lse, delta))
                    each = query_gradient(call, *given)
                    torch.sum(each.view(-1, part.width, q.shape[3]), 1, out=dq[b, h, part.first : part.last])
        if needs[1] or needs[2]:
            dk, dv = _key_gradients(schedule, scale, q, k, v, grad, lse, delta)
        return dq, dk, dv, None, None


def _key_gradients(schedule: Schedule, scale: float, q, k, v, grad, lse, delta) -> tuple[Tensor, Tensor]:
    """Keys of a head that has cells of its own get their gradient from that head alone; shared ones are summed."""
    cells, facts = by_key(schedule)
    group = q.shape[1] // k.shape[1]
    split = facts.lead_h > 1 and group > 1
    if split:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    empty = Flat(*(x[:0] for x in cells))
    spec = spec_of(SOFTMAX, 0, Facts(1, 1, 0, 0), facts, [])
    call = Call(q, k, v, None, None, [], [], [*empty, *cells], spec, [scale, 0.0, 0.0])
    grads = key_gradients(call, grad, lse, delta)
    if split:
        grads = tuple(x.unflatten(1, (-1, group)).sum(2) for x in grads)
    return grads  # type: ignore[return-value]


def _members(part: Part, schedule: Schedule, q: Tensor) -> list[tuple[int, int]]:
    """Return the batch elements and heads whose cells these are."""
    lead_b, lead_h = schedule.leading
    b, h = divmod(part.lead, lead_h)
    return [
        (i, j)
        for i in (range(q.shape[0]) if lead_b == 1 else (b,))
        for j in (range(q.shape[1]) if lead_h == 1 else (h,))
    ]


def _part_call(part: Part, b: int, h: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    key = h // (q.shape[1] // k.shape[1])
    rows = _copied(q[b, h, part.first : part.last], part.width)
    k, v = (x[b : b + 1, key : key + 1] for x in (k, v))
    spec = spec_of(SOFTMAX, 0, part.facts, None, [])
    return Call(rows, k, v, None, None, [], [], list(part.cells), spec, [scale, 0.0, 0.0])


def _copied(x: Float[Tensor, "n *w"], width: int) -> Float[Tensor, "1 1 copies *w"]:
    return x.unsqueeze(1).expand(-1, width, *x.shape[1:]).reshape(1, 1, -1, *x.shape[1:])


def _merge(
    outs: Float[Tensor, "copies dv"],
    lses: Float32[Tensor, "copies"],
    width: int,
    out: Float[Tensor, "n dv"],
    lse: Float32[Tensor, "n"],
) -> None:
    """Write what the copies of each query say together; copies in no cell have lse -inf and out 0."""
    shares, total = merge_shares(lses.view(-1, width).unbind(1))
    lse.copy_(total)
    out.copy_(torch.bmm(shares.T[:, None], outs.float().view(-1, width, outs.shape[1]))[:, 0])


def _parts(schedule: Schedule) -> list[Part]:
    """Return the parts of a schedule, kept with it."""
    return schedule.memo("cpu parts", lambda: _made(schedule))


def _made(schedule: Schedule) -> list[Part]:
    flat, facts, _ = flattened(schedule)
    sets, n_q = facts.lead_b * facts.lead_h, schedule.n_q
    rows, runs = flat.own_ptr.diff(), flat.run_ptr.diff()
    lead = torch.arange(sets).repeat_interleave(flat.set_ptr.diff())
    # Rows without keys stand in cells of their own, which say nothing.
    cells = ((rows > 0) & (runs > 0)).nonzero().flatten()
    if not len(cells):
        return []
    lead, rows, runs = lead[cells], rows[cells], runs[cells]
    own = flat.own[_ragged(flat.own_ptr[cells], rows)]
    stretch = flat.own[flat.own_ptr[cells]] // _STRETCH
    size = _STRETCH if torch.equal(own // _STRETCH, stretch.repeat_interleave(rows)) else n_q
    stretches = -(-n_q // size)
    place = lead * stretches + (stretch if size == _STRETCH else 0)
    if bool((place[1:] < place[:-1]).any()):
        place, order = place.sort(stable=True)
        cells, lead, rows, runs = cells[order], lead[order], rows[order], runs[order]
        own = flat.own[_ragged(flat.own_ptr[cells], rows)]
    # How many cells every query stands in, and which of them each place in a cell is. Narrow numbers where they
    # do: there is one per place.
    narrow = torch.int32 if sets * n_q < 1 << 31 else torch.int64
    query = own + (lead * n_q).to(narrow).repeat_interleave(rows)
    times = query.bincount(minlength=sets * n_q)
    before = (times.cumsum(0) - times).int().repeat_interleave(times)
    rank = torch.empty_like(own)
    rank[query.argsort(stable=True)] = torch.arange(len(own), dtype=torch.int32) - before
    width = pad(times.view(sets, -1), (0, stretches * size - n_q)).view(-1, size).amax(1)
    first = (place % stretches * size).int()
    own = (own - first.repeat_interleave(rows)) * width[place].int().repeat_interleave(rows) + rank
    own_ptr, run_ptr = (pad(x.cumsum(0), (1, 0)) for x in (rows, runs))
    run_list = flat.runs[_ragged(flat.run_ptr[cells], runs)]
    set_ptr = pad(place.bincount(minlength=sets * stretches).cumsum(0), (1, 0))
    whole = Flat(set_ptr, own_ptr, own, run_ptr, run_list, flat.mask_ptr[cells], flat.masks)
    parts, bounds, widths = [], set_ptr.tolist(), width.tolist()
    for number, (low, high) in enumerate(pairwise(bounds)):
        if low == high:
            continue
        which, first = number // stretches, number % stretches * size
        last = min(first + size, n_q)
        mine = int(own_ptr[high] - own_ptr[low])
        known = Facts(1, 1, int(mine == (last - first) * widths[number]), high - low)
        parts.append(
            Part(
                which,
                first,
                last,
                widths[number],
                whole._replace(set_ptr=set_ptr[number : number + 2]),
                known,
            )
        )
    return parts


def _ragged(start: Tensor, length: Tensor) -> Tensor:
    """Return the positions `start .. start + length - 1` of all rows, one after another."""
    shift = start - (length.cumsum(0) - length)
    return torch.arange(int(length.sum())) + shift.repeat_interleave(length)
