"""`scan_chunks`: the core's scan as a differentiable function, and as the operators `foveate::scan` of torch.library.

The operators make one node of a call for torch.compile and torch.export; eager calls on plain tensors go through an
autograd.Function that does the same at less cost. The core has first derivatives only: where a second one may be asked
for (`create_graph=True`) the gradient is computed through the chunk form of torch operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.kernels.cpu.scan import Scan, backward, borders_shape, check, forward

_PLAIN = (Tensor, torch.nn.Parameter)
# (scan, which of q, k, v, decay, state are wanted, gradient, gradient of the last state) -> differentiable gradients.
Twice = Callable[[Scan, tuple[bool, ...], Tensor | None, Tensor | None], list[Tensor | None]]


def scan_chunks(x: Scan, *, last: bool, twice: Twice) -> tuple[Tensor, Tensor | None]:
    """Run a checked call: the output, and the state after the last token if `last`. Differentiable.

    Args:
        x: the call.
        last: whether the last state is wanted.
        twice: computes the gradients in a way that is differentiable again.
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x[:5])
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(t is not None and type(t) not in _PLAIN for t in x[:5])
    ):
        out, final, _ = scan_op(*x, last, needed)
    elif needed:
        out, final = _Scan.apply(*x, last, twice)  # type: ignore[misc]
    else:
        out, final, _ = forward(x, last=last, keep=False)
    return out, final if last else None


class _Scan(torch.autograd.Function):
    """The eager way."""

    @staticmethod
    def forward(ctx, q, k, v, decay, state, inclusive, last, twice):
        out, final, borders = forward(Scan(q, k, v, decay, state, inclusive), last=last, keep=True)
        ctx.save_for_backward(q, k, v, decay, state, borders)
        ctx.rest = inclusive, twice
        ctx.set_materialize_grads(False)
        if not last:
            ctx.mark_non_differentiable(final)
        return out, final

    @staticmethod
    def backward(ctx, grad, grad_last):  # type: ignore[override]
        q, k, v, decay, state, borders = ctx.saved_tensors
        inclusive, twice = ctx.rest
        x, needs = Scan(q, k, v, decay, state, inclusive), ctx.needs_input_grad[:5]
        if grad is None and grad_last is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            return *twice(x, needs, grad, grad_last), None, None, None
        if grad is None:
            grad = x.v.new_zeros(()).expand_as(x.v)
        found = backward(x, grad, grad_last, borders, decay=needs[3], state=needs[4])
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("foveate::scan", mutates_args=(), device_types="cpu")
def scan_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    inclusive: bool,
    last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear attention with decay in the core.

    Args:
        q: float32 (b, h, n, dk), as are all tensors.
        k: (b, h, n, dk).
        v: (b, h, n, dv).
        decay: (1 or b, 1 or h, 1 or n, 1 or dk) log decays <= 0.
        state: (b, h, dk, dv) before the first token.
        inclusive: whether a token sees its own pair.
        last: whether the state after the last token is wanted.
        keep: whether there will be a backward.

    Returns:
        The output (b, h, n, dv), the last state and the states kept for the backward; of size 0 where not wanted.
    """
    x = Scan(q, k, v, decay, state, inclusive)
    check(x)
    return forward(x, last=last, keep=keep)


@scan_op.register_fake
def _(q, k, v, decay, state, inclusive, last, keep):
    final = (*q.shape[:2], q.shape[3], v.shape[3]) if last else (0,)
    return v.new_empty(v.shape), v.new_empty(final), v.new_empty(borders_shape(q, v) if keep else (0,))


@torch.library.custom_op("foveate::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward_op(
    grad: Tensor,
    grad_last: Tensor | None,
    borders: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    inclusive: bool,
    of_decay: bool,
    of_state: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, decay and state; of size 0 where there is none or it is not wanted."""
    x = Scan(q, k, v, decay, state, inclusive)
    last = (*q.shape[:2], q.shape[3], v.shape[3])
    check(
        x,
        ("grad", grad, tuple(v.shape)),
        ("grad_last", grad_last, last),
        ("borders", borders, borders_shape(q, v)),
    )
    found = backward(x, grad, grad_last, borders.contiguous(), decay=of_decay, state=of_state)
    return [q.new_empty(0) if g is None else g for g in found]


@scan_backward_op.register_fake
def _(grad, grad_last, borders, q, k, v, decay, state, inclusive, of_decay, of_state):
    nothing = q.new_empty(0)
    return [
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        q.new_empty(v.shape),
        nothing if decay is None or not of_decay else q.new_empty(decay.shape),
        q.new_empty((*q.shape[:2], q.shape[3], v.shape[3])) if of_state else q.new_empty(0),
    ]


def _setup(ctx, inputs, output):
    *tensors, inclusive, last, keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.rest = inclusive, last, keep
    ctx.mark_non_differentiable(*([] if last else [output[1]]), output[2])


def _backward(ctx, grad, grad_last, _):
    *tensors, borders = ctx.saved_tensors
    inclusive, last, keep = ctx.rest
    if not keep:
        raise UnsupportedError("foveate::scan has a gradient only when it is called with keep=True.")
    needs = ctx.needs_input_grad[:5]
    grad_last = grad_last if last else None
    found = scan_backward_op(grad, grad_last, borders, *tensors, inclusive, needs[3], needs[4])
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None


def _no_double_backward(ctx, *grads):
    raise UnsupportedError("backend 'cpu' has no second derivative here. Use backend='chunk' for it.")


scan_op.register_autograd(_backward, setup_context=_setup)
scan_backward_op.register_autograd(_no_double_backward)
