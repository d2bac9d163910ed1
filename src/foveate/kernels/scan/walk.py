"""Maps as sequences: tokens read along several paths at once, and what was computed there put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.paths import Path, inverses, orders


def along(x: Float[Tensor, "b *p n c"], paths: Sequence[Path]) -> Float[Tensor, "b p n c"]:
    """Read tokens in the order of every path: out[:, p, t] = x[:, order_p[t]], one head or group per path.

    Args:
        x: (B, N, C) for all paths, or (B, P, N, C), one sequence for each.
        paths: P walks over one grid of N tokens.

    Raises:
        ArgumentError: naming `x` or `paths`.
    """
    to, back = orders(paths, x.device), inverses(paths, x.device)
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim != 4 or x.shape[1] != len(paths):
        raise bad("x", tuple(x.shape), f"(batch, tokens, channels), or {len(paths)} paths on axis 1")
    paths[0].grid.check_tokens(x.shape[2], "x")
    return _Permute.apply(x, to, back)  # type: ignore[return-value]


def put_back(y: Float[Tensor, "b p n c"], paths: Sequence[Path]) -> Float[Tensor, "b p n c"]:
    """Undo `along`: every path's tokens in row-major order again, still one result per path.

    Raises:
        ArgumentError: naming `y` or `paths`.
    """
    to, back = inverses(paths, y.device), orders(paths, y.device)
    if y.ndim != 4 or y.shape[1] != len(paths):
        raise bad("y", tuple(y.shape), f"4 axes (batch, {len(paths)} paths, tokens, channels)")
    paths[0].grid.check_tokens(y.shape[2], "y")
    return _Permute.apply(y, to, back)  # type: ignore[return-value]


class _Permute(torch.autograd.Function):
    """out[:, p, t] = x[:, p or 0, index[p, t]]; the gradient reads with the inverse and scatters nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, inverse):
        return _take(x, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index, inverse = inputs
        ctx.shared = x.shape[1] == 1
        ctx.save_for_backward(index, inverse)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        grad = _Permute.apply(grad, inverse, index)
        return grad.sum(1, keepdim=True) if ctx.shared else grad, None, None


def _take(x: Float[Tensor, "b p1 n c"], index: Int[Tensor, "p n"]) -> Float[Tensor, "b p n c"]:
    """Whole rows of channels are copied; x has one sequence for all paths, or one each."""
    n = index.shape[1]
    shift = 0 if x.shape[1] == 1 else torch.arange(len(index), device=index.device).unsqueeze(1) * n
    return x.flatten(1, 2).index_select(1, (index + shift).flatten()).unflatten(1, index.shape)
