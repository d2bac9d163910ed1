"""`scan`, its single step and its normalised variant: the primitive for mechanisms that form no logits."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad, unknown
from foveate.kernels.cpu.scan import chunk_of
from foveate.kernels.scan import chunk as chunk_form
from foveate.kernels.scan import core, recurrent, reference
from foveate.kernels.scan.contract import ScanProblem, prepare, unrounded
from foveate.kernels.scan.watch import tell_watchers

BACKENDS = ("auto", "chunk", "cpu", "recurrent", "reference")
Backend = Literal["auto", "chunk", "cpu", "recurrent", "reference"]
Direction = bool | Literal["reverse"]


class ScanOptions(TypedDict, total=False):
    """The keyword options of `scan` that do not change what kind of thing it returns."""

    decay: Tensor | float | None
    scale: float
    initial_state: Tensor | None
    causal: Direction
    segments: Tensor | None
    backend: Backend
    chunk: int | None


@overload
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[ScanOptions],
) -> Tensor: ...
@overload
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: Literal[True],
    **options: Unpack[ScanOptions],
) -> tuple[Tensor, Tensor]: ...
def scan(
    q: Float[Tensor, "b h n dk"],
    k: Float[Tensor, "b hkv n dk"],
    v: Float[Tensor, "b hkv n dv"],
    *,
    decay: Tensor | float | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "b h dk dv"] | None = None,
    return_state: bool = False,
    causal: Direction = True,
    segments: Int[Tensor, "b n"] | None = None,
    backend: Backend = "auto",
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decayed linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale * q_t S_t.

    All forms compute the same sums: "reference" writes every weight out (O(N^2), the truth),
    "recurrent" walks token by token, "chunk" works in matrix products, "cpu" walks chunks in the C++
    core. "auto" takes "recurrent" for one token, "cpu" on a CPU where sums are float32 and the core is
    there, and "chunk" otherwise: for float64, accelerators, vmap, derivatives in forward mode, and where
    `chunk` is given. All are differentiable in q, k, v, decay and initial_state, any number of times, and
    hold no hidden state. A state may travel from one call to the next: the scan of a sequence equals the
    scans of its parts with `initial_state` handed on.

    Args:
        q: (B, H, N, D_k) queries.
        k: (B, H_kv, N, D_k) keys; H must be a multiple of H_kv, key head h serves queries
            h H / H_kv to (h + 1) H / H_kv - 1.
        v: (B, H_kv, N, D_v) values.
        decay: log decay g <= 0, None for none. A number or (H,): the same at every token.
            (B, H, N): one per token. (B, H, N, D_k): one per token and key channel. Axes of size 1
            are repeated. 0 keeps the state, -inf empties it before the token's own pair enters.
        scale: factor on q. No 1/sqrt(D_k) unless you say so.
        initial_state: (B, H, D_k, D_v) before the first token (the last one for "reverse").
        return_state: also return the state after the last token, in the accumulation dtype.
        causal: True: a token sees itself and what is before it. "reverse": itself and what is after
            it; the decay of a token acts when the state arrives there from the right. False: both,
            the sum of the two with each token's own pair counted once; no states.
        segments: (B or 1, N) integer ids of packed sequences: runs of one id never see each other.
            Negative ids are padding: output 0, seen by nobody, passed by the state unchanged. The
            first sequence starts from `initial_state`, `return_state` gives the last one's.
        backend: "auto", "chunk", "cpu", "recurrent" or "reference".
        chunk: tokens per chunk of "chunk", any positive number; the result does not depend on it. None for what
            is fastest on the CPUs at hand: 32 for one decay per token, where every chunk has a table of weights
            of its own, 64 otherwise. "cpu" has chunks of its own.

    Returns:
        (B, H, N, D_v) in the dtype of q, k, v (under autocast: the widest of them). Sums and states are
        kept in float32, or float64 for float64. With `return_state` also the state (B, H, D_k, D_v).

    Raises:
        ArgumentError: naming the argument that cannot be right.
        UnsupportedError: if backend is "cpu" and the core cannot run; says why.
    """
    _check_form(backend, chunk)
    dtype, states = _out_dtype(q, k, v), initial_state is not None or return_state
    if not isinstance(causal, bool) and causal != "reverse":
        raise bad("causal", causal, 'True, False or "reverse"')
    if causal is False and states:
        raise bad(
            "causal", causal, 'True or "reverse" when states are used', "A two-sided scan has no one state."
        )
    problem = prepare(q, k, v, decay, scale, initial_state, segments)
    if backend == "auto":
        backend = _decided(problem, chunk, causal)
    size = _length(backend, chunk, problem.decay)

    def form(p: ScanProblem) -> tuple[Tensor, Tensor]:
        if backend == "cpu":
            return core.run(p, state=initial_state is not None, last=return_state)
        return _chunked(p, size, states) if backend == "chunk" else _SLOW[backend](p)

    tell_watchers(
        problem.q,
        problem.v,
        problem.decay,
        causal=causal,
        backend=backend,
        chunk=size,
        itemsize=dtype.itemsize,
    )
    with unrounded(q.device):
        if causal is True:
            out, state = form(problem.folded())
        elif causal == "reverse":
            out, state = form(problem.reversed().folded())
            out = out.flip(2)
        else:
            out, state = _both(problem, form, backend), None
        if segments is not None:
            out = out.masked_fill((segments < 0)[:, None, :, None], 0.0)
        out = out.to(dtype)
    return (out, state) if return_state and state is not None else out


def scan_step(
    q: Float[Tensor, "b h dk"],
    k: Float[Tensor, "b hkv dk"],
    v: Float[Tensor, "b hkv dv"],
    state: Float[Tensor, "b h dk dv"] | None = None,
    *,
    decay: Tensor | float | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "b h dv"], Float[Tensor, "b h dk dv"]]:
    """Take one step of `scan`, as in decoding: its cost does not depend on how many steps came before.

    Args:
        q, k, v: one token of every head.
        state: what the previous step (or `scan(..., return_state=True)`) returned; None is empty.
        decay: as in `scan` without the token axis: a number, (H,), (B, H) or (B, H, D_k).
        scale: factor on q.

    Returns:
        The output (B, H, D_v) in the dtype of q, k, v, and the new state in the accumulation dtype. `state`
        itself is not changed.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise bad(name, tuple(x.shape), "3 axes (batch, heads, channels)")
    if isinstance(decay, Tensor) and decay.ndim >= 2:
        if decay.ndim > 3:
            raise bad("decay", tuple(decay.shape), "a number, or a tensor (H,), (B, H) or (B, H, D_k)")
        decay = decay.unsqueeze(2)
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    out, state = scan(
        q, k, v, decay=decay, scale=scale, initial_state=state, return_state=True, backend="recurrent"
    )
    return out.squeeze(2), state


@overload
def normalized_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-10,
    return_state: Literal[False] = False,
    **options: Unpack[ScanOptions],
) -> Tensor: ...
@overload
def normalized_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-10,
    return_state: Literal[True],
    **options: Unpack[ScanOptions],
) -> tuple[Tensor, Tensor]: ...
def normalized_scan(
    q: Float[Tensor, "b h n dk"],
    k: Float[Tensor, "b hkv n dk"],
    v: Float[Tensor, "b hkv n dv"],
    *,
    eps: float = 1e-10,
    return_state: bool = False,
    **options: Unpack[ScanOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`scan` divided by the sum of its weights: o_t = q_t S_t / (q_t z_t + eps).

    The normaliser z_t = exp(g_t) z_{t-1} + k_t is the scan of the constant value 1 and rides along as one
    more value channel; states are (B, H, D_k, D_v + 1) with z as their last column. Meant for features
    q, k >= 0; features of mixed sign can bring the divisor to zero. Where all weights are 0 the output is 0.

    Args:
        q, k, v: as in `scan`.
        eps: added to the divisor, which contains `scale`.
        return_state: also return the state, z included.
        **options: everything else `scan` takes.
    """
    dtype = _out_dtype(q, k, v)
    # The quotient is taken in the accumulation dtype: a divisor rounded to half precision would err as
    # much as a whole row.
    wide = accumulation_dtype(dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    joint = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    state = None
    if return_state:
        out, state = scan(q, k, joint, return_state=True, **options)
    else:
        out = scan(q, k, joint, **options)
    out = (out[..., :-1] / (out[..., -1:] + eps)).to(dtype)
    return out if state is None else (out, state)


_SLOW = {"recurrent": recurrent.run, "reference": reference.run}


def _check_form(backend: str, chunk: int | None) -> None:
    """Check the names and numbers that say how to compute."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise bad("chunk", chunk, "a positive number of tokens")
    if backend not in BACKENDS:
        raise unknown("backend of scan", str(backend), BACKENDS)


def _decided(p: ScanProblem, chunk: int | None, causal: Direction) -> Backend:
    """The form "auto" stands for."""
    if p.n == 1:
        return "recurrent"
    # Everybody sees everything: two products of torch, no chunks at all.
    everywhere = causal is False and p.decay is None and p.segments is None
    return "cpu" if not everywhere and core.chosen(p, chunk) else "chunk"


def _length(backend: str, chunk: int | None, decay: Tensor | None) -> int:
    """The tokens per chunk."""
    if backend == "cpu":
        return chunk_of(decay)
    if chunk is not None:
        return chunk
    return 32 if decay is not None and decay.shape[2] > 1 and decay.shape[3] == 1 else 64


def _chunked(problem: ScanProblem, chunk: int, states: bool) -> tuple[Tensor, Tensor]:
    """The chunk form; without the way through the states where that is longer."""
    per_channel = problem.decay is not None and problem.decay.shape[3] > 1
    if states or per_channel or not 0 < problem.n <= 2 * chunk:
        return chunk_form.run(problem, chunk)
    return chunk_form.run_alone(problem), problem.state


def _both(problem: ScanProblem, form, backend: str) -> Tensor:
    """The two-sided scan: forwards with each token's own pair, backwards without it."""
    if problem.decay is None and problem.segments is None and backend in ("auto", "chunk"):
        return chunk_form.run_everywhere(problem)
    forward, _ = form(problem.folded())
    backward, _ = form(problem.reversed().exclusive().folded())
    return forward + backward.flip(2)


def _out_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the result: that of the inputs, or the widest of them under autocast."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
