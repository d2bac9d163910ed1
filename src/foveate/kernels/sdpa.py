"""Backend `sdpa`: torch's scaled_dot_product_attention over all pairs, with a mask only where one is needed.

For dense problems, and for sparse ones in which so many pairs are needed that skipping the rest gains
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.tracing import fixed
from foveate.kernels.constants import dense_mask
from foveate.kernels.problem import Problem
from foveate.kernels.stages import mask_stage
from foveate.patterns.basic import Causal, Full
from foveate.scores.after import Dropout
from foveate.scores.base import Additive
from foveate.scores.rules import NEG_INF, Softmax

NAME = "sdpa"


def refuse(problem: Problem) -> str | None:
    """Say why this backend cannot serve the problem, None if it can."""
    if not isinstance(problem.weigh, Softmax):
        return f"torch's SDPA knows softmax only, not {type(problem.weigh).__name__}"
    if problem.weigh.sink is not None:
        return "torch's SDPA has no sink logit"
    if problem.return_lse:
        return "torch's SDPA does not return the lse"
    if not problem.one_rule:
        return f"cells combine by {problem.combine!r}, but torch's SDPA runs one softmax over all keys"
    for part in problem.score:
        if not isinstance(part, Additive):
            return f"torch's SDPA can only add to logits, {type(part).__name__} does something else"
    if problem.after:
        only = problem.after[0]
        plain = len(problem.after) == 1 and type(only) is Dropout
        if not plain or only.generator is not None or only.keep is not None:  # type: ignore[attr-defined]
            names = ", ".join(type(part).__name__ for part in problem.after)
            return f"torch's SDPA has dropout from the global generator only, not after=({names})"
    return None


def run(problem: Problem, plan: Any = None) -> tuple[Float[Tensor, "b h nq dv"], None]:
    """Return the output in the dtype of q; there is no lse."""
    dropout = problem.after[0].p if problem.after else 0.0  # type: ignore[attr-defined]
    shared = fixed(problem.heads) != fixed(problem.kv_heads)
    causal = is_causal(problem)
    bias = None if causal else _bias(problem)
    out = F.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, attn_mask=bias, dropout_p=dropout, is_causal=causal,
        scale=problem.scale, enable_gqa=shared,
    )  # fmt: skip
    return out, None


def is_causal(problem: Problem) -> bool:
    """Whether SDPA's own causal flag says everything, so that it skips half of the pairs by itself."""
    where = problem.where
    if type(where) is not Causal or problem.mask is not None or problem.score:
        return False
    # A branch and not the comparison: with symbolic sizes that would be no bool.
    return True if where.align == "start" or problem.n_q == problem.n_k else False  # noqa: SIM210


def needs_mask(problem: Problem) -> bool:
    """Whether a mask or bias over the pairs has to be made."""
    if is_causal(problem):
        return False
    some = problem.where is not None and type(problem.where) is not Full
    return some or bool(problem.score) or problem.mask is not None


def _bias(problem: Problem) -> Tensor | None:
    """Return what SDPA gets as attn_mask: None, bool, or additive in the dtype of q."""
    if not needs_mask(problem):
        return None
    allowed = _allowed(problem)
    if not problem.score:
        if problem.mask is None:
            return allowed
        if problem.frame is None and allowed is None:
            return problem.mask if problem.mask.dtype == torch.bool else problem.mask.to(problem.dtype)
    at = problem.all_pairs()
    bias = problem.q.new_zeros((1, 1, 1, 1), dtype=problem.accumulate)
    for part in problem.score:
        bias = bias + part.values(at).to(bias.dtype)  # type: ignore[attr-defined]
    bias, allowed = mask_stage(problem, bias, at, allowed)
    if allowed is not None:
        bias = bias.masked_fill(~allowed, NEG_INF)
    if bias.shape[-2:] != (problem.n_q, problem.n_k):
        bias = bias.expand(*bias.shape[:-2], problem.n_q, problem.n_k)
    return bias.to(problem.dtype)


def _allowed(problem: Problem) -> Tensor | None:
    if problem.where is None or type(problem.where) is Full:
        return None
    if problem.schedule is None:
        return dense_mask(problem.where, fixed(problem.n_q), fixed(problem.n_k), problem.q.device)[None, None]
    return problem.allowed()
