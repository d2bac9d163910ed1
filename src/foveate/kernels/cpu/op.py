"""`attend_cells`: the core as a differentiable function, and as the operators `foveate::cpu` of torch.library.

The operators make one node of a call for torch.compile and torch.export. Eager calls on plain tensors skip the
dispatcher's Python (a third of a millisecond with a gradient) and go through an autograd.Function that does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.kernels.cpu.flatten import check as check_cells
from foveate.kernels.cpu.job import Call, Grads, Wanted, backward, check, empty_like, forward
from foveate.kernels.cpu.library import SIGMOID

PLAIN = (Tensor, torch.nn.Parameter)


def attend_cells(call: Call) -> tuple[Tensor, Tensor]:
    """Run a call: `(out, lse)`, differentiable with respect to q, k, v, factor, sink and tables.

    `call.cells` must come from `flatten`, or be checked by the operator.
    """
    inputs = (call.q, call.k, call.v, call.factor, call.sink, *call.tables)
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(x is not None and type(x) not in PLAIN for x in inputs)
    ):
        return attend_cells_op(*call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Attend.apply(call, *inputs)  # type: ignore[return-value]
    return forward(call)


class _Attend(torch.autograd.Function):
    """The eager way. `call` carries the tensors once more, for what is constant in it."""

    @staticmethod
    def forward(ctx, call: Call, q, k, v, factor, sink, *tables):
        call = call._replace(q=q, k=k, v=v, factor=factor, sink=sink, tables=tables)
        out, lse = forward(call)
        ctx.save_for_backward(q, k, v, factor, sink, out, lse, *tables)
        ctx.codes, ctx.cells, ctx.rest = call.codes, call.cells, (call.spec, call.numbers)
        if call.rule == SIGMOID:
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):  # type: ignore[override]
        q, k, v, factor, sink, out, lse, *tables = ctx.saved_tensors
        call = Call(q, k, v, factor, sink, tables, ctx.codes, ctx.cells, *ctx.rest)
        _, *needs = ctx.needs_input_grad
        wanted = Wanted(needs[0], needs[1] or needs[2], needs[3], needs[4], needs[5:])
        if grad is None:
            grad = torch.zeros_like(out)
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: the operator knows that there is no second derivative
            grads = _through_op(call, grad, grad_lse, out, lse, wanted)
        else:
            grads = backward(call, grad, grad_lse, out, lse, wanted)
        kept = [g if need else None for g, need in zip(grads[:5], needs, strict=False)]
        return None, *kept, *grads.tables


# ---- operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("foveate::cpu", mutates_args=(), device_types="cpu")
def attend_cells_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor | None,
    sink: Tensor | None,
    tables: Sequence[Tensor],
    codes: Sequence[Tensor],
    cells: Sequence[Tensor],
    spec: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Attend within flattened cells.

    Args:
        q: (b, h, n_q, d) in float32, bfloat16 or float16, rows contiguous.
        k: (b, h_kv, n_k, d).
        v: (b, h_kv, n_k, d_v).
        factor: float32 (1 or b, 1 or h, n_q), multiplies the logits first.
        sink: float32 (h,), the logit of a key without value.
        tables: biases, float32 (1 or b, 1 or h, size) each: the pair (q, k) reads entry
            `clamp(q_code[q] + k_code[k] + base)`.
        codes: int32 q_code (n_q,) and k_code (n_k,) of every table.
        cells: the `Flat` of the queries; for gradients followed by that of the keys.
        spec: rule, pairs computed, the `Facts` of both, base of every table.
        numbers: scale, soft-cap (0: none), bias of the sigmoid.

    Returns:
        `out (b, h, n_q, d_v)` in the dtype of q and `lse (b, h, n_q)` in float32, of size 0 for rules without.
    """
    call = _checked(Call(q, k, v, factor, sink, tables, codes, cells, spec, numbers))
    return forward(call)


@attend_cells_op.register_fake
def _(q, k, v, factor, sink, tables, codes, cells, spec, numbers):
    lse = q.new_empty((0,) if spec[0] == SIGMOID else q.shape[:3], dtype=torch.float32)
    return empty_like(q, v.shape[3]), lse


@torch.library.custom_op("foveate::cpu_backward", mutates_args=(), device_types="cpu")
def attend_cells_backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor | None,
    sink: Tensor | None,
    tables: Sequence[Tensor],
    codes: Sequence[Tensor],
    cells: Sequence[Tensor],
    spec: Sequence[int],
    numbers: Sequence[float],
    wanted: Sequence[int],
) -> list[Tensor]:
    """Return the gradients of q, k, v, factor, sink and the tables; of size 0 where `wanted` says 0.

    `wanted` has one entry each for q, (k, v), factor, sink and every table.
    """
    call = _checked(Call(q, k, v, factor, sink, tables, codes, cells, spec, numbers))
    flags = Wanted(*(bool(w) for w in wanted[:4]), tables=[bool(w) for w in wanted[4:]])
    grads = backward(call, grad, grad_lse, out, lse, flags)
    every = [*grads[:5], *grads.tables]
    return [q.new_empty(0) if g is None else g for g in every]


@attend_cells_backward_op.register_fake
def _(grad, grad_lse, out, lse, q, k, v, factor, sink, tables, codes, cells, spec, numbers, wanted):
    want = Wanted(*wanted[:4], tables=wanted[4:])

    def like(x, use):
        return torch.empty_like(x, memory_format=torch.contiguous_format) if use else q.new_empty(0)

    return [
        empty_like(q, q.shape[3]),
        empty_like(k, k.shape[3]) if want.kv else q.new_empty(0),
        empty_like(v, v.shape[3]) if want.kv else q.new_empty(0),
        like(factor, want.factor),
        like(sink, want.sink),
        *(like(t, use) for t, use in zip(tables, want.tables, strict=True)),
    ]


def _checked(call: Call) -> Call:
    """Check what compiled or exported code hands in, before raw pointers are made of it.

    Raises:
        ArgumentError: naming what does not fit.
    """
    call = call._replace(
        q=_rows(call.q), k=_rows(call.k), v=_rows(call.v), spec=list(call.spec), numbers=list(call.numbers)
    )
    check(call)
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    flat, facts = call.by_query()
    check_cells(flat, facts, call.q.shape[2], call.k.shape[2], call.q.shape[0], heads)
    if len(call.cells) > 7:
        flat, facts = call.by_key()
        check_cells(flat, facts, call.k.shape[2], call.q.shape[2], call.k.shape[0], kv_heads)
    return call


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _through_op(call: Call, grad, grad_lse, out, lse, wanted: Wanted) -> Grads:
    flags = [int(w) for w in (*wanted[:4], *wanted.tables)]
    found = attend_cells_backward_op(grad, grad_lse, out, lse, *call, flags)
    used = [True, wanted.kv, wanted.kv, wanted.factor, wanted.sink, *wanted.tables]
    grads = [g if use else None for g, use in zip(found, used, strict=True)]
    return Grads(*grads[:5], tables=grads[5:])  # type: ignore[misc]


def _setup(ctx, inputs, output):
    call = Call(*inputs)
    ctx.save_for_backward(*call[:5], *output, *call.tables, *call.codes, *call.cells)
    ctx.sizes = len(call.tables), len(call.codes), len(call.cells)
    ctx.rest = call.spec, call.numbers
    if call.rule == SIGMOID:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, grad_lse):
    q, k, v, factor, sink, out, lse, *lists = ctx.saved_tensors
    n, m, c = ctx.sizes
    call = Call(q, k, v, factor, sink, lists[:n], lists[n : n + m], lists[n + m :], *ctx.rest)
    needs = ctx.needs_input_grad
    tables = list(needs[5]) if n else []
    wanted = Wanted(needs[0], needs[1] or needs[2], needs[3], needs[4], tables)
    grads = _through_op(call, grad, None if call.rule == SIGMOID else grad_lse, out, lse, wanted)
    kept = [g if need else None for g, need in zip(grads[:5], needs, strict=False)]
    return *kept, grads.tables, [None] * m, [None] * c, None, None


def _no_double_backward(ctx, *grads):
    raise UnsupportedError("backend 'cpu' has no second derivative. Use backend='reference' for it.")


attend_cells_op.register_autograd(_backward, setup_context=_setup)
attend_cells_backward_op.register_autograd(_no_double_backward)
