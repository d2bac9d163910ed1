"""The stages between products and weights, the same for every backend that forms logits.

logits -> score -> where and mask -> rule -> after, on the whole problem or on a block of cells.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from foveate.kernels.problem import Problem
from foveate.scores.pairs import Pairs, take_pairs
from foveate.scores.rules import NEG_INF


def score_stage(
    problem: Problem, products: Float[Tensor, "b h *cells tq tk"], at: Pairs
) -> Float[Tensor, "b h *cells tq tk"]:
    """Scale the products q.k^T (in the accumulation dtype) and apply the scores."""
    logits = products * problem.scale
    for part in problem.score:
        logits = part.apply(logits, at)
    return logits


def mask_stage(
    problem: Problem,
    logits: Float[Tensor, "b h *cells tq tk"],
    at: Pairs,
    allowed: Bool[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "b h *cells tq tk"], Bool[Tensor, "..."] | None]:
    """Add a float mask, join a bool mask (or the -inf of a float mask) to `allowed`.

    Phantom keys are not masked: `mask` speaks about real keys only.
    """
    if problem.mask is None:
        return logits, allowed
    mask = take_pairs(problem.mask, at, phantom=not problem.mask.is_floating_point())
    if mask.is_floating_point():
        finite = mask != NEG_INF
        return logits + mask.to(logits.dtype), finite if allowed is None else allowed & finite
    return logits, mask if allowed is None else allowed & mask


def weigh_stage(
    problem: Problem,
    logits: Float[Tensor, "b h *cells tq tk"],
    at: Pairs,
    allowed: Bool[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "b h *cells tq tk"], Float[Tensor, "b h *cells tq"] | None]:
    """Mask, apply the rule and the after-values; pairs that may not attend end with weight 0.

    Args:
        problem: the call.
        logits: after `score_stage`.
        at: which pairs they are.
        allowed: bool broadcastable to the logits: what `where` says about these pairs, None = all.
    """
    logits, allowed = mask_stage(problem, logits, at, allowed)
    weights, lse = problem.weigh.weights(logits, allowed)
    for part in problem.after:
        weights = part.apply(weights, at)
    if problem.after and allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    return weights, lse
