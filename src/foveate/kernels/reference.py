"""The truth: `attend` in plain tensor code. Any dtype, twice differentiable, vmap-safe, slow on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.problem import Problem
from foveate.kernels.stages import score_stage, weigh_stage
from foveate.scores.pairs import take_rows

NAME = "reference"


def refuse(problem: Problem) -> str | None:
    """Return None: the reference serves every problem."""
    return None


def run(problem: Problem, plan: Any = None) -> tuple[Float[Tensor, "b h nq dv"], Tensor | None]:
    """Return the output in the dtype of q, and the natural-log lse in the accumulation dtype (or None)."""
    if problem.one_rule:
        out, lse = _dense(problem)
    else:
        out, lse = _cells(problem), None
    return out.to(problem.dtype), lse


def _dense(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """One rule over every key of a query: the whole N_q x N_k problem under a mask."""
    q, k, v = _accumulated(problem)
    at = problem.all_pairs()
    logits = score_stage(problem, q @ k.transpose(-2, -1), at)
    weights, lse = weigh_stage(problem, logits, at, problem.allowed())
    return weights @ v, lse


def _cells(problem: Problem) -> Tensor:
    """Each cell runs the rule over its own keys; then the cells of a query combine."""
    q, k, v = _accumulated(problem)
    outs, ids = [], []
    for group in problem.schedule.groups:
        q_ids, k_ids = group.q_ids().to(q.device), group.k_ids().to(q.device)
        at = problem.pairs(q_ids, k_ids)
        products = take_rows(q, at.q) @ take_rows(k, at.k).transpose(-2, -1)
        allowed, mask = at.present, group.mask()
        if mask is not None:
            allowed = allowed & mask.to(q.device)
        weights, _ = weigh_stage(problem, score_stage(problem, products, at), at, allowed)
        outs.append(weights @ take_rows(v, at.k))
        ids.append(q_ids)
    return combine_cells(
        outs, ids, problem.combine, (problem.batch, problem.heads, problem.n_q, problem.d_v), q
    )


def combine_cells(
    outs: Sequence[Float[Tensor, "b h cells tq dv"]],
    q_ids: Sequence[Int[Tensor, "bi hi cells tq"]],
    combine: Any,
    shape: tuple[int, int, int, int],
    like: Tensor,
) -> Float[Tensor, "b h nq dv"]:
    """Bring the outputs of cells back to their queries; a query in no cell gets zeros.

    Args:
        outs: one tensor per group of cells, zero in rows of absent queries or not: they are left out.
        q_ids: the query of every row, -1 = absent.
        combine: "sum" or "lse" (which for finished outputs is a sum), `Mean` or `Weights`.
        shape: `(B, H, N_q, D_v)`.
        like: gives dtype and device of the result.
    """
    b, h, n_q, d_v = shape
    total, count = like.new_zeros(shape), like.new_zeros(b, h, n_q)
    factors = _factors(combine, len(outs))
    for out, ids, factor in zip(outs, q_ids, factors, strict=True):
        present = (ids >= 0).to(out.dtype)
        if factor is not None:
            out = out * factor.to(out.dtype).unsqueeze(-1)
        rows = (out * present.unsqueeze(-1)).expand(b, h, *out.shape[2:]).flatten(2, -2)
        index = ids.clamp_min(0).expand(b, h, *ids.shape[2:]).flatten(2)
        total = total.scatter_add(2, index.unsqueeze(-1).expand(-1, -1, -1, d_v), rows)
        count = count.scatter_add(2, index, present.expand(b, h, *ids.shape[2:]).flatten(2))
    if hasattr(combine, "eps"):
        return _divide(total, count.unsqueeze(-1) + combine.eps)
    return total


def _divide(total: Tensor, count: Tensor) -> Tensor:
    return total / count.masked_fill(count == 0, 1.0)


def _factors(combine: Any, n_groups: int) -> Sequence[Tensor | None]:
    weights = getattr(combine, "weights", None)
    if weights is None:
        return [None] * n_groups
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if len(weights) != n_groups:
        raise bad("Weights", len(weights), f"{n_groups} tensors (b, h, cells, t_q), one per group of cells")
    return weights


def _accumulated(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v in the accumulation dtype, key heads repeated for the query heads they serve."""
    q, k, v = (x.to(problem.accumulate) for x in (problem.q, problem.k, problem.v))
    if problem.kv_heads != problem.heads:
        share = problem.heads // problem.kv_heads
        k, v = (torch.repeat_interleave(x, share, dim=1) for x in (k, v))
    return q, k, v
