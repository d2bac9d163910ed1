"""Backend `tiles`: executes any Schedule, cell by cell, in plain torch. Anywhere, any score, any rule.

Two ways. *Fused*: softmax with additive scores runs through torch's fused attention operator (`fused.py`),
with masks of one cell, and keeps nothing per cell for the backward. *Plain*: everything else forms the logits
of the
cells: products -> score -> rule -> after -> values, with ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.tracing import fixed
from foveate.kernels.cells import CellView, Item, fold_heads, unfold_heads
from foveate.kernels.constants import is_traced, static_program, static_views
from foveate.kernels.fused import tiles as fused_tiles
from foveate.kernels.problem import Problem
from foveate.kernels.program import Program, program, views
from foveate.kernels.stages import score_stage, weigh_stage
from foveate.kernels.transfer import KEYS, QUERIES, fold_cells, take_cells
from foveate.scores.base import Additive, lift
from foveate.scores.pairs import Pairs, take_pairs
from foveate.scores.rules import NEG_INF, Softmax
from foveate.scores.temperature import RowFactor

NAME = "tiles"

# Bytes of logits formed at a time where no gradient is recorded; see fused.BLOCK_BYTES for why so few.
LOGIT_BYTES = 16 << 20
# Bytes of bias that the fused way may hold. Biases that do not depend on the cell are far below it.
BIAS_BYTES = 256 << 20


def refuse(problem: Problem) -> str | None:
    """Say why this backend cannot serve the problem, None if it can."""
    if problem.where is None:
        return "there is no `where`: every pair is needed and no cell can be skipped"
    if any(is_traced(x) for x in (problem.q, problem.k, problem.v)):
        return "its operators cannot run under torch.func transforms (vmap, grad, jvp)"
    schedule = problem.schedule
    if schedule is None or not problem.one_rule:
        return None
    nonlinear = [type(part).__name__ for part in problem.after if not part.linear]
    whole_rows = problem.weigh.mergeable is None or (nonlinear and problem.weigh.mergeable == "lse")
    if whole_rows and not schedule.is_single_cell:
        what = ", ".join(nonlinear) or type(problem.weigh).__name__
        return f"queries stand in several cells, and {what} must see all keys of a query at once"
    return None


def fusable(problem: Problem) -> str | None:
    """Say why the fused way is closed (a phrase), None if it is open. Reads no tensor."""
    if type(problem.weigh) is not Softmax:
        return f"{type(problem.weigh).__name__} is not a softmax"
    if problem.after:
        return f"{type(problem.after[0]).__name__} changes the weights"
    if not problem.one_rule:
        return f"cells combine by {problem.combine!r}"
    _, rest = _row_factors(problem)
    for part in rest:
        if not isinstance(part, Additive):
            return f"{type(part).__name__} is not additive"
        if torch.is_grad_enabled() and any(t.requires_grad for t in part.tensors().values()):
            return f"{type(part).__name__} needs a gradient"
    if problem.mask is not None and problem.mask.requires_grad and torch.is_grad_enabled():
        return "the mask needs a gradient"
    return None


class _Work(NamedTuple):
    """The cells to execute."""

    program: Program
    plan: Any
    problem: Problem
    single: bool  # every query stands in one cell at most

    def views(self) -> tuple[CellView, ...]:
        """Return the items as tensors."""
        problem, device = self.problem, self.problem.q.device
        if problem.schedule is None:
            n_q, n_k = fixed(problem.n_q), fixed(problem.n_k)
            return static_views(problem.where, n_q, n_k, self.plan.tile, device)
        return views(self.plan.schedule, device)


def run(problem: Problem, plan: Any) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"] | None]:
    """Return the output in the dtype of q, and the natural-log lse in the accumulation dtype (or None)."""
    work = _prepare(problem, plan)
    if not work.program.code or 0 in (*problem.q.shape, *problem.v.shape):
        return _nothing(problem)
    if work.single and fusable(problem) is None:
        biases = _biases(problem, work)
        if biases is not None:
            return _fused(problem, work.program, biases)
    return _plain(problem, work)


def _prepare(problem: Problem, plan: Any) -> _Work:
    if problem.schedule is None:
        n_q, n_k = fixed(problem.n_q), fixed(problem.n_k)
        code, tensors, n_items = static_program(problem.where, n_q, n_k, plan.tile, problem.q.device)
        return _Work(Program(code, tensors, n_items), plan, problem, True)
    schedule = plan.schedule
    # Whether cells share queries is read from their ids, which a traced call does not do: combining is always right.
    alone = not torch.compiler.is_compiling() and schedule.is_single_cell
    return _Work(program(schedule, problem.q.device), plan, problem, alone or schedule.product is not None)


def _nothing(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """No pair anywhere: zeros that still belong to the graph."""
    out = problem.q.new_zeros((*problem.q.shape[:3], problem.d_v))
    out = out + 0.0 * (problem.q.sum() + problem.k.sum() + problem.v.sum())
    lse = None
    if problem.return_lse:
        lse = problem.q.new_full(problem.q.shape[:3], NEG_INF, dtype=problem.accumulate)
        sink = getattr(problem.weigh, "sink", None)
        if sink is not None:
            _, lse = problem.weigh.finish(out, lse)  # type: ignore[attr-defined]
    return out, lse


# ---- fused
# ------------------------------------------------------------------------------------------------------


def _row_factors(problem: Problem) -> tuple[list[Tensor], list]:
    """Split the scores into the row factors they start with, which can scale q instead, and the rest."""
    factors, rest = [], list(problem.score)
    while rest and type(rest[0]) is RowFactor:
        factors.append(lift(rest.pop(0).tensors()["t"], 3))
    return factors, rest


def _biases(problem: Problem, work: _Work) -> Sequence[Tensor | None] | None:
    """Return what is added to the logits of each item, `(b, h, c0, c1, tq, tk)` up to broadcasting.

    None when it would not fit in BIAS_BYTES.
    """
    _, rest = _row_factors(problem)
    if not rest and problem.mask is None:
        return [None for _ in range(work.program.n_items)]
    biases, total = [], 0
    with torch.no_grad():
        for view in work.views():
            at = _pairs(problem, view)
            bias = None
            for part in rest:
                value = part.values(at).to(problem.accumulate)  # type: ignore[attr-defined]
                bias = value if bias is None else bias + value
            if problem.mask is not None:
                mask = take_pairs(problem.mask, at, phantom=not problem.mask.is_floating_point())
                if not mask.is_floating_point():
                    mask = torch.zeros_like(mask, dtype=problem.accumulate).masked_fill(~mask, NEG_INF)
                bias = mask.to(problem.accumulate) if bias is None else bias + mask
            assert bias is not None
            bias = lift(bias, 6)
            total += bias.numel() * bias.element_size()
            if total > BIAS_BYTES:
                return None
            biases.append(bias)
    return biases


def _fused(problem: Problem, prog: Program, biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    q = problem.q
    factors, _ = _row_factors(problem)
    for factor in factors:
        q = (q * factor.unsqueeze(-1)).to(q.dtype)
    tensors, where = list(prog.tensors), []
    for bias in biases:
        where.append(-1 if bias is None else len(tensors))
        if bias is not None:
            tensors.append(bias)
    rule = problem.weigh
    assert isinstance(rule, Softmax)
    with_lse = problem.return_lse or rule.sink is not None
    code = [len(where), *where, *prog.code]
    out, lse = fused_tiles(q, problem.k, problem.v, tensors, code, problem.scale, with_lse)
    if rule.sink is not None:
        out, lse = rule.finish(out, lse)
    return out, lse if problem.return_lse else None


# ---- plain
# ------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    out: Float[Tensor, "c0 b h c1 tq dv"]
    lse: Float[Tensor, "c0 b h c1 tq"] | None


def _plain(problem: Problem, work: _Work) -> tuple[Tensor, Tensor | None]:
    prog = work.program
    merge_lse = problem.one_rule and problem.weigh.mergeable == "lse" and not work.single
    inner = problem
    if merge_lse and isinstance(problem.weigh, Softmax):
        inner = replace(problem, weigh=problem.weigh.bare())
    q, k, v = (x.to(problem.accumulate) for x in (problem.q, problem.k, problem.v))
    if problem.needs_grad or torch.compiler.is_compiling():
        tensors, code = list(prog.tensors), list(prog.code)
        qs = take_cells(q, tensors, code, QUERIES, problem.heads)
        ks = take_cells(k, tensors, code, KEYS, problem.heads)
        vs = take_cells(v, tensors, code, KEYS, problem.heads)
        every = work.views()
        results = [_cell(inner, every[i], qs[i], ks[i], vs[i]) for i in range(len(every))]
    else:
        results = [_bounded(inner, item, q, k, v) for item in prog.items()]
    outs = [r.out for r in results]
    if not problem.one_rule:
        return _combined(problem, work, outs).to(problem.dtype), None
    lses = [r.lse for r in results]
    if merge_lse:
        out, lse = _merged(problem, work, outs, lses)
        if isinstance(problem.weigh, Softmax):
            out, lse = problem.weigh.finish(out, lse)
    else:
        out = _fold(problem, prog, outs, problem.d_v)
        lse = _fold_lse(problem, prog, lses) if problem.return_lse else None
    return out.to(problem.dtype), lse if problem.return_lse else None


def _cell(problem: Problem, view: CellView, qc: Tensor, kc: Tensor, vc: Tensor) -> _Result:
    """Attend inside the cells of one item, given what was gathered for them."""
    b, h, c1 = qc.shape[1:4]
    share = h // kc.shape[2]
    products = fold_heads(qc, share) @ kc.flatten(1, 3).transpose(-2, -1)
    products = unfold_heads(products, share, b, h, c1).permute(1, 2, 0, 3, 4, 5)
    at = _pairs(problem, view)
    weights, lse = weigh_stage(problem, score_stage(problem, products, at), at, view.mask)
    weights = weights.permute(2, 0, 1, 3, 4, 5)
    out = fold_heads(weights, share) @ vc.flatten(1, 3)
    return _Result(unfold_heads(out, share, b, h, c1), None if lse is None else lse.permute(2, 0, 1, 3, 4))


def _bounded(problem: Problem, item: Item, q: Tensor, k: Tensor, v: Tensor) -> _Result:
    """Attend inside the cells of one item, some of them at a time."""
    per_cell = problem.batch * problem.heads * item.c0 * item.c1 // item.cells
    per_cell *= item.tq * item.tk * q.element_size()
    step = max(1, LOGIT_BYTES // per_cell)
    along = 0 if item.static else 3
    parts = []
    for first in range(0, item.cells, step):
        part = item if step >= item.cells else item.narrow(first, min(first + step, item.cells))
        view = part.view(problem.n_q, problem.n_k, q.device)
        parts.append(
            _cell(problem, view, part.take_q(q), part.take_k(k, q.shape[1]), part.take_k(v, q.shape[1]))
        )
    if len(parts) == 1:
        return parts[0]
    lses = [p.lse for p in parts if p.lse is not None]
    return _Result(torch.cat([p.out for p in parts], along), torch.cat(lses, along) if lses else None)


def _pairs(problem: Problem, view: CellView) -> Pairs:
    return problem.pairs(view.q_ids, view.k_ids, alike=view.alike)


def _fold(problem: Problem, prog: Program, cells: Sequence[Tensor], width: int) -> Float[Tensor, "b h nq w"]:
    shape = [problem.batch, problem.heads, problem.n_q, width]
    return fold_cells(list(cells), list(prog.tensors), list(prog.code), QUERIES, shape)


def _fold_lse(problem: Problem, prog: Program, lses: Sequence[Tensor | None]) -> Float[Tensor, "b h nq"]:
    """Bring the lse home, a query in one cell at most; -inf where there was no key."""
    found = [lse for lse in lses if lse is not None]
    empty = [lse == NEG_INF for lse in found]
    values = [lse.masked_fill(e, 0.0).unsqueeze(-1) for lse, e in zip(found, empty, strict=True)]
    seen = [(~e).to(problem.accumulate).unsqueeze(-1) for e in empty]
    total = _fold(problem, prog, values, 1).squeeze(-1)
    return total.masked_fill(_fold(problem, prog, seen, 1).squeeze(-1) == 0, NEG_INF)


def _merged(
    problem: Problem, work: _Work, outs: Sequence[Tensor], lses: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Merge the cells of a query by log-sum-exp."""
    b, h, n_q = problem.batch, problem.heads, problem.n_q
    found = [lse for lse in lses if lse is not None]
    top = problem.q.new_full((b, h, n_q + 1), NEG_INF, dtype=problem.accumulate)
    indices = []
    for view, lse in zip(work.views(), found, strict=True):
        index = torch.where(view.q_ids < 0, n_q, view.q_ids).expand(b, h, *view.q_ids.shape[2:])
        indices.append(index)
        # The maximum only keeps exp() in range, a constant at every order of differentiation.
        rows = lse.detach().permute(1, 2, 0, 3, 4).reshape(b, h, -1)
        top = top.scatter_reduce(2, index.reshape(b, h, -1), rows, "amax")
    top = top.masked_fill(top == NEG_INF, 0.0)
    shares = []
    for index, lse in zip(indices, found, strict=True):
        own = top.gather(2, index.reshape(b, h, -1)).view(index.shape).permute(2, 0, 1, 3, 4)
        shares.append(torch.exp(lse - own).unsqueeze(-1))
    total = _fold(problem, work.program, shares, 1)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weighted = [out * share for out, share in zip(outs, shares, strict=True)]
    out = _fold(problem, work.program, weighted, problem.d_v) / total
    return out, (top[..., :n_q] + total.squeeze(-1).log()).masked_fill(empty.squeeze(-1), NEG_INF)


def _combined(problem: Problem, work: _Work, outs: Sequence[Tensor]) -> Tensor:
    """Combine the finished outputs of the cells of a query: sum, mean or weighted sum."""
    combine = problem.combine
    weights = [None] * len(outs)
    if hasattr(combine, "weights"):
        # With Weights there is one item a group, see `program`; groups without cells are left out.
        groups = problem.schedule.groups
        kept = [w for g, w in zip(groups, combine.weights, strict=True) if g.n_cells and g.tq and g.tk]
        weights = [w.to(outs[0].dtype) for w in kept]
    scaled, present = [], []
    for view, out, weight in zip(work.views(), outs, weights, strict=True):
        here = (view.q_ids >= 0).to(out.dtype)
        present.append(_slots(here, out))
        if weight is not None:  # (b, h, c, tq)
            here = here * weight.unsqueeze(3 if view.static else 2)
        scaled.append(out * _slots(here, out))
    total = _fold(problem, work.program, scaled, problem.d_v)
    if hasattr(combine, "eps"):
        count = _fold(problem, work.program, present, 1) + combine.eps
        total = total / count.masked_fill(count == 0, 1.0)
    return total


def _slots(x: Float[Tensor, "b h c0 c1 tq"], like: Tensor) -> Float[Tensor, "c0 b h c1 tq 1"]:
    """Bring one number per query slot to the layout of outputs."""
    return x.permute(2, 0, 1, 3, 4).unsqueeze(-1).expand(*like.shape[:-1], 1)
