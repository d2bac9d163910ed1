"""Selective state spaces (S6, Mamba): a scan whose decay differs in every entry of the state.

Per group g (a direction, a head) with C channels that share B and C, and a state H of shape (S, C):

    H_t[s, c] = exp(dt_t[c] A[c, s]) H_{t-1}[s, c] + dt_t[c] B_t[s] u_t[c]
    y_t[c]    = sum_s C_t[s] H_t[s, c] + D[c] u_t[c]

This is `scan` with q = C, k = B, v = dt u and a log decay dt A that depends on the key *and* the value channel, so
the state is laid out alike, (B, G, S, C). Such a decay has no form in matrix products: with one head per channel
`scan` computes it, but every channel then writes its own table of weights. Here the decays and new pairs of a
short piece of tokens are made at once, one fused multiply-add per token runs the recurrence in place, and one
product per piece reads the outputs. Nothing of size N x S x C exists: the gradient keeps one state per piece and
makes the others again.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.dtypes import FLOATS, accumulation_dtype
from foveate.core.errors import bad, unknown
from foveate.kernels.scan import pieces
from foveate.kernels.scan.contract import check_segments, seen, segment_resets, unrounded

BACKENDS = ("auto", "pieces", "recurrent", "reference")
Backend = Literal["auto", "pieces", "recurrent", "reference"]


@overload
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    causal: Literal[True, "reverse"] = True,
    segments: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    causal: Literal[True, "reverse"] = True,
    segments: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    u: Float[Tensor, "b g n c"],
    dt: Float[Tensor, "b g n c"],
    A: Float[Tensor, "g c s"],
    B: Float[Tensor, "b g n s"],
    C: Float[Tensor, "b g n s"],
    *,
    D: Float[Tensor, "g c"] | None = None,
    initial_state: Float[Tensor, "b g s c"] | None = None,
    return_state: bool = False,
    causal: Literal[True, "reverse"] = True,
    segments: Int[Tensor, "b n"] | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state space of the module docstring over N tokens.

    Directions of a 2-d scan are groups: read the map along its paths (`along` in `kernels.scan`), scan all of them
    in one call, and write back. A direction that runs backwards is a reversed path.

    Args:
        u: (B, G, N, C) inputs.
        dt: (B, G, N, C) step sizes >= 0, after the softplus where there is one.
        A: (G, C, S) or (1, C, S), negative; usually -exp(A_log).
        B, C: (B, G, N, S) what of the input enters the state, and what of the state is read.
        D: (G, C) or (1, C) factor of the direct path from u, None for none.
        initial_state: (B, G, S, C) before the first token (the last one for "reverse").
        return_state: also return the state after the last token, in the accumulation dtype.
        causal: True, or "reverse": a token sees itself and what is after it.
        segments: (B or 1, N) integer ids of packed sequences, as in `scan`.
        backend: "auto" and "pieces": as the module docstring says, gradients of any order; not under vmap, and
            left alone by torch.compile.
            "recurrent": a plain loop. "reference": every weight written out, O(N^2 C S).

    Returns:
        (B, G, N, C) in the dtype of u; the state is kept in float32, or float64 for float64. With
        `return_state` also the state (B, G, S, C).

    Raises:
        ArgumentError: naming the argument that cannot be right.
    """
    dtype = u.dtype
    with unrounded(u.device):
        p, u = _prepare(u, dt, A, B, C, D, initial_state, segments, causal)
        if backend in ("auto", "pieces"):
            y, last = pieces.run(*p)
        elif backend == "recurrent":
            y, last = pieces.recurrent(*p)
        elif backend == "reference":
            y, last = pieces.reference(*p)
        else:
            raise unknown("backend of selective_scan", str(backend), BACKENDS)
        y = _tokens_second(y, causal)
        if D is not None:
            y = y + D.to(y.dtype).unsqueeze(-2) * u.to(y.dtype)
    return (y.to(dtype), last) if return_state else y.to(dtype)


def selective_states(
    u: Float[Tensor, "b g n c"],
    dt: Float[Tensor, "b g n c"],
    A: Float[Tensor, "g c s"],
    B: Float[Tensor, "b g n s"],
    *,
    initial_state: Float[Tensor, "b g s c"] | None = None,
    causal: Literal[True, "reverse"] = True,
    segments: Int[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b g n s c"]:
    """Return the state after every token, for mechanisms that mix states before they read them.

    `sum_s C[..., s, None] * states[..., s, :]` is then what `selective_scan` returns without D. Memory is N S C;
    arguments and errors are those of `selective_scan`. States of padding are 0. In the accumulation dtype.
    """
    with unrounded(u.device):
        p, _ = _prepare(u, dt, A, B, None, None, initial_state, segments, causal)
        states, _ = pieces.run(*p)
        states = _tokens_second(states, causal)
        if segments is not None:
            states = states.masked_fill((segments < 0)[:, None, :, None, None], 0.0)
    return states


def selective_step(
    u: Float[Tensor, "b g c"],
    dt: Float[Tensor, "b g c"],
    A: Float[Tensor, "g c s"],
    B: Float[Tensor, "b g s"],
    C: Float[Tensor, "b g s"],
    state: Float[Tensor, "b g s c"] | None = None,
    *,
    D: Float[Tensor, "g c"] | None = None,
) -> tuple[Float[Tensor, "b g c"], Float[Tensor, "b g s c"]]:
    """Take one step of `selective_scan`, as in decoding; `state` is what the step before returned.

    Returns:
        The output (B, G, C) in the dtype of u, and the new state. `state` itself is not changed.
    """
    for name, x in (("u", u), ("dt", dt), ("B", B), ("C", C)):
        if x.ndim != 3:
            raise bad(name, tuple(x.shape), "3 axes (batch, groups, channels or states)")
    u, dt, B, C = (x.unsqueeze(2) for x in (u, dt, B, C))
    y, state = selective_scan(
        u, dt, A, B, C, D=D, initial_state=state, return_state=True, backend="recurrent"
    )
    return y.squeeze(2), state


def _prepare(u, dt, A, B, C, D, state, segments, causal):
    """Check one call; return x, dt, A, B, C, state, resets as `pieces` takes them, and u without padding."""
    if causal is not True and causal != "reverse":
        raise bad("causal", causal, 'True or "reverse"', "Two directions are two groups, or two calls.")
    for name, x in (("u", u), ("dt", dt), ("B", B), ("C", C)):
        if x is None:
            continue
        if x.ndim != 4:
            raise bad(name, tuple(x.shape), "4 axes (batch, groups, tokens, channels or states)")
        if x.dtype not in FLOATS:
            raise bad(name, x.dtype, "a floating point dtype", "Convert it with .float() first.")
        if x.shape[:3] != u.shape[:3]:
            raise bad(name, tuple(x.shape), f"{tuple(u.shape[:3])} as its first axes, to go with u")
    b, g, _, c = u.shape
    if dt.shape != u.shape:
        raise bad("dt", tuple(dt.shape), f"{tuple(u.shape)}, the shape of u")
    if A.ndim != 3 or A.shape[0] not in (1, g) or A.shape[1] != c:
        raise bad("A", tuple(A.shape), f"({g}, {c}, S)")
    s = A.shape[2]
    for name, x in (("B", B), ("C", C)):
        if x is not None and x.shape[3] != s:
            raise bad(name, tuple(x.shape), f"{s} states on the last axis, to go with A {tuple(A.shape)}")
    if D is not None and (D.ndim != 2 or D.shape[0] not in (1, g) or D.shape[1] != c):
        raise bad("D", tuple(D.shape), f"({g}, {c})")
    if state is not None and state.shape != (b, g, s, c):
        raise bad("initial_state", tuple(state.shape), f"{(b, g, s, c)}: (batch, groups, states, channels)")
    if seen(dt < 0):
        raise bad("dt", float(dt.min()), "step sizes >= 0", "Apply softplus to what the network gives.")
    if seen(A > 0):
        raise bad("A", float(A.max()), "values <= 0, a state that fades", "Pass -exp(A_log).")
    dtype = accumulation_dtype(u.dtype)
    if state is None:
        state = torch.zeros(b, g, s, c, dtype=dtype, device=u.device)
    resets = None
    if segments is not None:
        check_segments(segments, u)
        # Resets stand where a sequence starts in the order of the scan.
        here, _ = segment_resets(segments.flip(1) if causal == "reverse" else segments)
        gone = segments < 0
        # Padding leaves the state alone: no step is taken, nothing enters, nothing is read.
        u, dt, B = (part.masked_fill(gone[:, None, :, None], 0.0) for part in (u, dt, B))
        C = None if C is None else C.masked_fill(gone[:, None, :, None], 0.0)
        resets = here.T[:, :, None, None, None].expand(-1, b, 1, 1, 1)
    dt = dt.to(dtype)
    x, dt, B = (_tokens_first(part.to(dtype), causal) for part in (dt * u.to(dtype), dt, B))
    C = None if C is None else _tokens_first(C.to(dtype), causal)
    A = A.to(dtype).mT.expand(g, s, c).contiguous()
    return (x, dt, A, B, C, state.to(dtype), resets), u


def _tokens_first(x: Tensor, causal: bool | str) -> Tensor:
    """(b, g, n, c) to a contiguous (n, b, g, c), in the order of the scan."""
    x = x.permute(2, 0, 1, 3)
    return x.flip(0) if causal == "reverse" else x.contiguous()


def _tokens_second(x: Tensor, causal: bool | str) -> Tensor:
    """Undo `_tokens_first`: (n, b, g, ...) to (b, g, n, ...)."""
    return (x.flip(0) if causal == "reverse" else x).movedim(0, 2)
