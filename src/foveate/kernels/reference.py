"""The truth: `attend` in plain tensor code. Any dtype, twice differentiable, vmap-safe, slow on purpose."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.combine import combine_cells
from foveate.kernels.problem import Problem
from foveate.kernels.stages import score_stage, weigh_stage
from foveate.scores.pairs import look_up

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
        products = look_up(q, at.q) @ look_up(k, at.k).transpose(-2, -1)
        allowed, mask = at.present, group.mask()
        if mask is not None:
            allowed = allowed & mask.to(q.device)
        weights, _ = weigh_stage(problem, score_stage(problem, products, at), at, allowed)
        outs.append(weights @ look_up(v, at.k))
        ids.append(q_ids)
    return combine_cells(
        outs, ids, problem.combine, (problem.batch, problem.heads, problem.n_q, problem.d_v), q
    )


def _accumulated(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v in the accumulation dtype, key heads repeated for the query heads they serve."""
    q, k, v = (x.to(problem.accumulate) for x in (problem.q, problem.k, problem.v))
    if problem.kv_heads != problem.heads:
        share = problem.heads // problem.kv_heads
        k, v = (torch.repeat_interleave(x, share, dim=1) for x in (k, v))
    return q, k, v
