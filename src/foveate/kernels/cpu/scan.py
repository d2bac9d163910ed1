"""One call of the core's scan: its struct, what is checked before pointers are made of tensors, forward and backward.

The core walks chunks of tokens, one task per (batch, head), see `core/scan.h`. Everything is float32.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.cpu.library import SCAN_BACKWARD, SCAN_FORWARD, TensorArg, isa, library

# Tokens of a chunk: what was fastest for 64 channels.
CHUNK, CHUNK_PER_CHANNEL = 64, 32
# Tokens between the states that are kept for the backward: it computes those between them again, in cache.
SPAN = 512
# Tasks that are made of few heads, from columns of v; not of fewer columns than these.
TASKS, COLUMNS = 4, 32


class ScanArg(Structure):
    """`fv_scan`: one call."""

    _fields_ = (
        *((name, c_int32) for name in ("abi", "isa", "threads", "channels", "inclusive", "unused")),
        *((name, c_int64) for name in ("batch", "heads", "n", "dim", "dim_v")),
        *((name, c_int64) for name in ("chunk", "span", "parts", "width")),
        *((name, TensorArg) for name in ("q", "k", "v", "decay")),
        *((name, c_void_p) for name in ("state", "out", "last", "borders")),
        ("d_out", TensorArg),
        *((name, c_void_p) for name in ("d_last", "d_q", "d_k", "d_v", "d_decay", "d_state")),
        ("parallel", c_void_p),
    )


class Scan(NamedTuple):
    """The tensors of a call, all float32.

    Attributes:
        q, k: (B, H, N, D_k).
        v: (B, H, N, D_v).
        decay: (B|1, H|1, N|1, D_k|1) log decays, or None.
        state: (B, H, D_k, D_v) before the first token, None for zeros.
        inclusive: whether a token sees its own pair.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    state: Tensor | None
    inclusive: bool


def chunk_of(decay: Tensor | None) -> int:
    """The tokens of the core's chunks."""
    return CHUNK_PER_CHANNEL if decay is not None and decay.shape[3] > 1 else CHUNK


def borders_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """The shape of the states that the forward keeps for the backward."""
    b, h, n, dk = q.shape
    return b, h, (n - 1) // SPAN, dk, v.shape[3]


def forward(x: Scan, *, last: bool, keep: bool) -> tuple[Float32[Tensor, "b h n dv"], Tensor, Tensor]:
    """Return the output, the last state and the states kept for the backward; of size 0 where not wanted."""
    x, job = _job(x)
    (b, h, n, dk), dv = x.q.shape, x.v.shape[3]
    out = torch.empty(b, h, n, dv)
    final = torch.empty((b, h, dk, dv) if last else 0)
    borders = torch.empty(borders_shape(x.q, x.v) if keep else 0)
    job.out = out.data_ptr()
    job.last = final.data_ptr() if last else None
    job.borders = borders.data_ptr() if borders.numel() else None
    library().launch(SCAN_FORWARD, job)
    return out, final, borders


def backward(
    x: Scan, grad: Tensor, grad_last: Tensor | None, borders: Tensor, *, decay: bool, state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, of decay and of state; the last two None unless asked for."""
    x, job = _job(x)
    (b, h, n, dk), dv, parts = x.q.shape, x.v.shape[3], job.parts
    grad = _rows(grad)
    grad_last = None if grad_last is None else grad_last.contiguous()
    shape = (parts, b, h, n, dk)
    d_q, d_k, d_v = torch.empty(shape), torch.empty(shape), torch.empty(b, h, n, dv)
    d_decay = torch.empty((*shape[:4], dk if job.channels else 1)) if decay and x.decay is not None else None
    d_state = torch.empty(b, h, dk, dv) if state else None
    job.d_out = _tensor(grad)
    job.borders = borders.data_ptr()
    for name, tensor in (
        ("d_last", grad_last), ("d_q", d_q), ("d_k", d_k), ("d_v", d_v), ("d_decay", d_decay), ("d_state", d_state),
    ):  # fmt: skip
        setattr(job, name, None if tensor is None else tensor.data_ptr())
    library().launch(SCAN_BACKWARD, job)
    d_q, d_k = (g[0] if parts == 1 else g.sum(0) for g in (d_q, d_k))
    if d_decay is not None and x.decay is not None:
        d_decay = (d_decay[0] if parts == 1 else d_decay.sum(0)).sum_to_size(x.decay.shape)
    return d_q, d_k, d_v, d_decay, d_state


def check(x: Scan, *others: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Check everything the core takes on trust; `others` are (name, tensor, shape).

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    if x.q.ndim != 4 or x.v.ndim != 4 or 0 in (*x.q.shape[2:], x.v.shape[3]):
        shapes = tuple(x.q.shape), tuple(x.v.shape)
        raise bad("q, v", shapes, "(batch, heads, tokens, channels), at least one token and channel")
    b, h, n, dk = x.q.shape
    dv = x.v.shape[3]
    known = (("q", x.q, (b, h, n, dk)), ("k", x.k, (b, h, n, dk)), ("v", x.v, (b, h, n, dv)))
    for name, tensor, shape in (*known, ("state", x.state, (b, h, dk, dv)), *others):
        if tensor is not None and (tuple(tensor.shape) != shape or not _plain(tensor)):
            raise bad(name, (tuple(tensor.shape), tensor.dtype), f"float32 {shape} on the CPU")
    g = x.decay
    if g is not None and (
        g.ndim != 4 or not _plain(g) or any(i not in (1, j) for i, j in zip(g.shape, x.q.shape, strict=True))
    ):
        raise bad("decay", (tuple(g.shape), g.dtype), f"float32 that broadcasts to {(b, h, n, dk)}")


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _job(x: Scan) -> tuple[Scan, ScanArg]:
    """The struct of a call, without results, and the tensors it points into."""
    decay = None if x.decay is None else _rows(x.decay)
    state = None if x.state is None else x.state.contiguous()
    x = Scan(_rows(x.q), _rows(x.k), _rows(x.v), decay, state, x.inclusive)
    b, h, n, dk = x.q.shape
    dv = x.v.shape[3]
    # By shapes alone: results must not depend on the number of threads.
    parts = max(1, min(-(-TASKS // max(1, b * h)), dv // COLUMNS))
    width = -(-dv // (16 * parts)) * 16
    job = ScanArg(isa=isa(), threads=torch.get_num_threads(), inclusive=int(x.inclusive))
    job.batch, job.heads, job.n, job.dim, job.dim_v = b, h, n, dk, dv
    job.chunk, job.span, job.parts, job.width = chunk_of(decay), SPAN, -(-dv // width), width
    job.q, job.k, job.v = _tensor(x.q), _tensor(x.k), _tensor(x.v)
    if decay is not None:
        job.channels, job.decay = int(decay.shape[3] > 1), _tensor(decay)
    job.state = None if state is None else state.data_ptr()
    return x, job


def _rows(x: Tensor) -> Tensor:
    if x.stride(3) == 1 or x.shape[3] == 1:
        return x
    if x.stride(2) == 0:  # one row for all tokens, such as the gradient of a sum
        return x[:, :, :1].contiguous().expand(x.shape)
    return x.contiguous()


def _tensor(x: Tensor) -> TensorArg:
    """Axes of size 1 are repeated."""
    b, h, n = (stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    return TensorArg(ctypes.c_void_p(x.data_ptr()), b, h, n)
