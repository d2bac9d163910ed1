"""`merge`: join results over disjoint sets of keys into the result over all of them, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.rules import NEG_INF


def merge(
    outs: Sequence[Float[Tensor, "b h n dv"]], lses: Sequence[Float[Tensor, "b h n"]] | None = None
) -> Tensor | tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Merge pieces: by log-sum-exp when their `lses` are given, by plain sum otherwise.

    Rules with a row sum (`Softmax`) need the lses: each piece is `attend(..., return_lse=True)` over its
    own keys. Rules without one (`Sigmoid`, `ReLU`, `Exp`) merge by sum. Both are exact and differentiable,
    in any order and grouping. A piece whose lse is -inf (no key) adds nothing; where all are, the result
    is 0 with lse -inf.

    Args:
        outs: outputs of equal shape.
        lses: their natural-log lses, the shape of the outputs without the last dimension.

    Returns:
        `(out, lse)` with lses, `out` alone without. `out` has the dtype of the first output.

    Raises:
        ArgumentError: if there is nothing to merge, or shapes differ.
    """
    outs = list(outs)
    if not outs:
        raise bad("outs", outs, "at least one output")
    shape = outs[0].shape
    for i, out in enumerate(outs):
        if out.shape != shape:
            raise bad(f"outs[{i}]", tuple(out.shape), f"{tuple(shape)}, the shape of outs[0]")
    if lses is None:
        return torch.stack(outs).sum(0)
    lses = list(lses)
    if len(lses) != len(outs):
        raise bad("lses", f"{len(lses)} tensors", f"{len(outs)}, one per output")
    for i, lse in enumerate(lses):
        if lse.shape != shape[:-1]:
            hint = "It is the second result of attend(..., return_lse=True)."
            raise bad(f"lses[{i}]", tuple(lse.shape), f"{tuple(shape[:-1])}", hint)
    shares, lse = merge_shares(lses)
    first, *rest = shares.unsqueeze(-1).unbind(0)
    total = outs[0].to(first.dtype) * first
    for out, share in zip(outs[1:], rest, strict=True):
        total = torch.addcmul(total, out.to(share.dtype), share)
    return total.to(outs[0].dtype), lse


def merge_shares(
    lses: Sequence[Float[Tensor, "*rows"]],
) -> tuple[Float[Tensor, "pieces *rows"], Float[Tensor, "*rows"]]:
    """Return how much each piece counts in the result over all keys, and the lse of that result.

    For those who weigh pieces further before adding them up; `merge` is the sum of shares * outs.

    Args:
        lses: one per piece, of equal shape.

    Returns:
        shares, which add up to 1, or are 0 where no piece has a key; the natural-log lse, -inf there.
    """
    logs = torch.stack(list(lses))
    # The maximum only keeps exp() in range: a constant, at every order of differentiation.
    top = logs.detach().amax(0)
    top = top.masked_fill(top == NEG_INF, 0.0)
    shares = torch.exp(logs - top)
    total = shares.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return shares / total, (top + total.log()).masked_fill(empty, NEG_INF)
