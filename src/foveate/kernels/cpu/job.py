"""One call of the core: tensors in, pointers out, results in fresh tensors. Nothing here is differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.cpu.flatten import Facts, Flat, argument
from foveate.kernels.cpu.library import (
    BACKWARD_KEY,
    BACKWARD_QUERY,
    BF16,
    F16,
    F32,
    FORWARD,
    MAX_TERMS,
    SIGMOID,
    Job,
    TensorArg,
    TermArg,
    isa,
    library,
)

NEG_INF = float("-inf")
DTYPES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
# Tasks of a call: many enough for the largest machine, and a fixed number, so that sums over slices do not depend
# on the threads.
_TASKS, _SUMMED_TASKS = 512, 128
# Bytes of partial sums of table gradients.
_PARTIAL_BYTES = 64 << 20


class Call(NamedTuple):
    """The arguments of the operator, see `op.py`."""

    q: Float[Tensor, "b h nq d"]
    k: Float[Tensor, "b hkv nk d"]
    v: Float[Tensor, "b hkv nk dv"]
    factor: Float32[Tensor, "bf hf nq"] | None
    sink: Float32[Tensor, "h"] | None
    tables: Sequence[Float32[Tensor, "bt ht s"]]
    codes: Sequence[Int32[Tensor, "n"]]
    cells: Sequence[Tensor]
    spec: Sequence[int]
    numbers: Sequence[float]

    @property
    def rule(self) -> int:
        """SOFTMAX or SIGMOID."""
        return self.spec[0]

    @property
    def bases(self) -> Sequence[int]:
        """The base of every term."""
        return self.spec[10:]

    def by_query(self) -> tuple[Flat, Facts]:
        """Cells whose own rows are queries."""
        return Flat(*self.cells[:7]), Facts(*self.spec[2:6])

    def by_key(self) -> tuple[Flat, Facts]:
        """Cells whose own rows are keys."""
        if len(self.cells) < 14:
            hint = "Ask for a gradient in the call that is traced or exported, by inputs with requires_grad=True."
            raise bad("cells", "those of the queries only", "those of the keys too for a gradient", hint)
        return Flat(*self.cells[7:14]), Facts(*self.spec[6:10])


def spec_of(rule: int, pairs: int, by_query: Facts, by_key: Facts | None, bases: Sequence[int]) -> list[int]:
    """Return the integers of a call: rule, pairs computed, facts of the cells, base of every term."""
    return [rule, pairs, *by_query, *(by_key or Facts(1, 1, 0, 0)), *bases]


def empty_like(x: Float[Tensor, "b h n d"], width: int) -> Float[Tensor, "b h n w"]:
    """Return an empty tensor with rows of `width`, tokens outside of heads in memory where `x` has it so."""
    b, h, n, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((b, n, h, width)).transpose(1, 2)
    return x.new_empty((b, h, n, width))


def forward(call: Call) -> tuple[Float[Tensor, "b h nq dv"], Float32[Tensor, "b h nq"]]:
    """Return the output and the lse (of size 0 for rules without one)."""
    q, v = call.q, call.v
    flat, facts = call.by_query()
    out = empty_like(q, v.shape[3])
    if call.rule == SIGMOID:
        lse = torch.empty(0)
    elif call.sink is not None and not facts.covers:
        lse = call.sink[:, None].expand(*q.shape[:3]).contiguous()
    else:
        lse = torch.empty(q.shape[:3]) if facts.covers else torch.full(q.shape[:3], NEG_INF)
    if not facts.covers:
        out.zero_()
    job = _job(call)
    job.out, job.by_query = _tensor(out), argument(flat, facts)
    job.lse = lse.data_ptr() if lse.numel() else None
    job.slices = _slices(facts.cells, q.shape[0] * q.shape[1], _TASKS)
    library().launch(FORWARD, job)
    return out, lse


class Grads(NamedTuple):
    """Gradients of a call; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    factor: Tensor | None
    sink: Tensor | None
    tables: list[Tensor | None]


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    q: bool
    kv: bool
    factor: bool
    sink: bool
    tables: Sequence[bool]


def backward(
    call: Call,
    grad: Float[Tensor, "b h nq dv"],
    grad_lse: Float32[Tensor, "b h nq"] | None,
    out: Float[Tensor, "b h nq dv"],
    lse: Float32[Tensor, "b h nq"],
    wanted: Wanted,
) -> Grads:
    """Return the gradients, recomputing the weights from the lse."""
    if grad.stride(3) != 1:
        grad = grad.contiguous()
    job = _job(call)
    job.d_out = _tensor(grad)
    delta = None
    if call.rule != SIGMOID:
        # Minus the gradient of the lse; the core adds rowsum(grad * out), what weights carry away from each other.
        if grad_lse is None:
            delta = torch.zeros(lse.shape)
        else:
            delta = grad_lse.masked_fill(lse == NEG_INF, 0.0).neg_().contiguous()
        job.out, job.lse, job.delta, job.finish_delta = _tensor(out), lse.data_ptr(), delta.data_ptr(), 1
    # The keys' pass needs what the queries' pass adds to delta.
    dq, d_factor, d_tables = _query_pass(call, job, wanted)
    dk = dv = d_sink = None
    if wanted.kv:
        dk, dv = _key_pass(call, job)
    if wanted.sink and call.sink is not None and delta is not None:
        d_sink = _over_rows((call.sink[:, None] - lse).exp_().mul_(delta).neg_())
    return Grads(dq, dk, dv, d_factor, d_sink, d_tables)


def query_gradient(
    call: Call,
    grad: Float[Tensor, "b h nq dv"],
    lse: Float32[Tensor, "b h nq"],
    delta: Float32[Tensor, "b h nq"],
) -> Float[Tensor, "b h nq d"]:
    """Return the gradient of q, given the lse of all keys of a query and `delta`, rowsum(grad * out) less its grad."""
    job = _job(call)
    job.d_out, job.lse, job.delta = _tensor(grad), lse.data_ptr(), delta.data_ptr()
    return _query_pass(call, job, Wanted(True, False, False, False, []))[0]


def key_gradients(
    call: Call,
    grad: Float[Tensor, "b h nq dv"],
    lse: Float32[Tensor, "b h nq"],
    delta: Float32[Tensor, "b h nq"],
) -> tuple[Float[Tensor, "b hkv nk d"], Float[Tensor, "b hkv nk dv"]]:
    """Return the gradients of k and v, given what `query_gradient` is given."""
    job = _job(call)
    job.d_out, job.lse, job.delta = _tensor(grad), lse.data_ptr(), delta.data_ptr()
    return _key_pass(call, job)


def _query_pass(call: Call, job: Job, wanted: Wanted) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    flat, facts = call.by_query()
    b, h, n_q, _ = call.q.shape
    dq = empty_like(call.q, call.q.shape[3])
    if not facts.covers:
        dq.zero_()
    job.d_q, job.by_query = _tensor(dq), argument(flat, facts)
    d_factor = None
    if wanted.factor:
        d_factor = torch.zeros(b, h, n_q)
        job.d_row_factor = d_factor.data_ptr()
    sizes = [t.shape[2] for t, want in zip(call.tables, wanted.tables, strict=True) if want]
    tasks = _SUMMED_TASKS if sizes else _TASKS
    limit = _PARTIAL_BYTES // max(4 * b * h * sum(sizes), 1)
    slices = (
        min(_slices(facts.cells, b * h, tasks), max(1, limit))
        if sizes
        else _slices(facts.cells, b * h, tasks)
    )
    job.slices = slices
    partial: list[Tensor | None] = []
    for term, table, want in zip(job.terms, call.tables, wanted.tables, strict=False):
        sums = torch.zeros(b, h, slices, table.shape[2]) if want else None
        partial.append(sums)
        if sums is not None:
            term.grad = sums.data_ptr()
            term.grad_stride_b, term.grad_stride_h, term.grad_stride_slice = sums.stride()[:3]
    library().launch(BACKWARD_QUERY, job)
    tables = [
        None if sums is None else _summed(sums, table)
        for sums, table in zip(partial, call.tables, strict=True)
    ]
    if d_factor is not None and call.factor is not None:
        d_factor = _summed(d_factor.unsqueeze(2), call.factor)
    return dq, d_factor, tables


def _key_pass(call: Call, job: Job) -> tuple[Tensor, Tensor]:
    flat, facts = call.by_key()
    dk, dv = empty_like(call.k, call.k.shape[3]), empty_like(call.v, call.v.shape[3])
    if not facts.covers:
        dk.zero_()
        dv.zero_()
    job.d_k, job.d_v, job.by_key = _tensor(dk), _tensor(dv), argument(flat, facts)
    job.slices = _slices(facts.cells, call.k.shape[0] * call.k.shape[1], _TASKS)
    library().launch(BACKWARD_KEY, job)
    return dk, dv


def _slices(cells: int, sets: int, tasks: int) -> int:
    return max(1, min(cells, -(-tasks // max(sets, 1))))


def _summed(
    parts: Float32[Tensor, "b h s n"], like: Float32[Tensor, "bt ht n"]
) -> Float32[Tensor, "bt ht n"]:
    """Add the slices, and the batches and heads that share a table, in a fixed order."""
    for dim, keep in ((2, 1), (0, like.shape[0]), (1, like.shape[1])):
        if parts.shape[dim] > keep:
            first, *rest = parts.split(1, dim)
            total = first.clone()
            for part in rest:
                total += part
            parts = total
    return parts.squeeze(2)


def _over_rows(x: Float32[Tensor, "b h n"]) -> Float32[Tensor, "h"]:
    """Sum over batch and rows in an order that does not depend on the number of threads."""
    pieces = 64
    x = torch.nn.functional.pad(x, (0, -x.shape[2] % pieces)).unflatten(2, (pieces, -1))
    return x.sum(-1).sum((0, 2))


# ---- pointers ---------------------------------------------------------------------------------------------------


def _job(call: Call) -> Job:
    q, k, v = call.q, call.k, call.v
    scale, softcap, sigmoid_bias = call.numbers
    job = Job(
        dtype=DTYPES[q.dtype], rule=call.rule, isa=isa(), threads=torch.get_num_threads(),
        n_terms=len(call.tables), batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], n_q=q.shape[2],
        n_k=k.shape[2], dim=q.shape[3], dim_v=v.shape[3], scale=scale, softcap=softcap,
        sigmoid_bias=sigmoid_bias, q=_tensor(q), k=_tensor(k), v=_tensor(v),
    )  # fmt: skip
    if call.factor is not None:
        job.row_factor = call.factor.data_ptr()
        job.row_factor_stride_b, job.row_factor_stride_h = _strides(call.factor)
    if call.sink is not None:
        job.sink = call.sink.data_ptr()
    for i, table in enumerate(call.tables):
        stride_b, stride_h = _strides(table)
        job.terms[i] = TermArg(
            table=table.data_ptr(), stride_b=stride_b, stride_h=stride_h, size=table.shape[2],
            q_code=call.codes[2 * i].data_ptr(), k_code=call.codes[2 * i + 1].data_ptr(), base=call.bases[i],
        )  # fmt: skip
    return job


def _tensor(x: Tensor) -> TensorArg:
    return TensorArg(x.data_ptr(), *x.stride()[:3])


def _strides(x: Float32[Tensor, "b h n"]) -> tuple[int, int]:
    """Return the strides of the leading dimensions, 0 where the tensor is shared."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def check(call: Call) -> None:
    """Check everything the core takes on trust but the ids in `cells`, see `flatten.check`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    q, k, v = call.q, call.k, call.v
    b, h, n_q, d = q.shape
    h_kv, n_k = k.shape[1], k.shape[2]
    for name, x, shape in (
        ("q", q, (b, h, n_q, d)),
        ("k", k, (b, h_kv, n_k, d)),
        ("v", v, (b, h_kv, n_k, v.shape[3])),
    ):
        if tuple(x.shape) != shape or x.dtype != q.dtype or x.dtype not in DTYPES or x.stride(3) != 1:
            raise bad(name, (tuple(x.shape), x.dtype, x.stride()), f"{shape} in {q.dtype}, rows contiguous")
    if h_kv == 0 or h % h_kv or not all(8 <= n <= 256 and n % 8 == 0 for n in (d, v.shape[3])):
        raise bad("q, k, v", (tuple(q.shape), tuple(v.shape)), "grouped heads, head sizes 8, 16, .., 256")
    n = len(call.tables)
    if n > MAX_TERMS or len(call.codes) != 2 * n or len(call.bases) != n:
        raise bad("tables", n, f"at most {MAX_TERMS}, each with two codes and a base")
    rows = [("factor", call.factor, (b, h, n_q))]
    rows += [("tables", t, (b, h, max(t.shape[-1], 1))) for t in call.tables]
    for name, x, want in rows:
        if x is None:
            continue
        fits = x.ndim == 3 and x.shape[2] == want[2] and x.shape[0] in (1, b) and x.shape[1] in (1, h)
        if not fits or x.dtype != torch.float32 or not x.is_contiguous():
            raise bad(name, (tuple(x.shape), x.dtype), f"contiguous float32 that broadcasts to {want}")
    if call.sink is not None and (call.sink.shape != (h,) or call.sink.dtype != torch.float32):
        raise bad("sink", (tuple(call.sink.shape), call.sink.dtype), f"float32 ({h},)")
    for i, code in enumerate(call.codes):
        _check_code(f"codes[{i}]", code, n_k if i % 2 else n_q)


def _check_code(name: str, code: Int[Tensor, "n"], n: int) -> None:
    if tuple(code.shape) != (n,) or code.dtype != torch.int32 or not code.is_contiguous():
        raise bad(name, (tuple(code.shape), code.dtype), f"contiguous int32 ({n},)")
