"""The forms of the selective scan, tokens first: in pieces with a gradient of its own, plain loop, all pairs.

Every form takes x = dt u and dt (N, B, G, C), A (G, S, C), B and C (N, B, G, S), the state before (B, G, S, C)
and resets (N, B, 1, 1, 1) or None, and returns the outputs (N, B, G, C), or all states (N, B, G, S, C) where C is
None, and the last state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.tracing import run_eagerly
from foveate.kernels.scan.reference import log_weights

# Entries of the states of one piece: few enough for the level-2 cache, many enough to hide the overhead of a call.
TOGETHER = 1 << 17


class _Pieces(torch.autograd.Function):
    """The form in pieces. Tokens come first in memory, so that a token's step is one contiguous multiply-add."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, state, resets):
        outs, starts = [], []
        for x_, dt_, B_, C_, r_ in _split(x, dt, B, C, resets, A):
            starts.append(state)
            _, states = _states(x_, dt_, A, B_, r_, state)
            state = states[-1].clone()
            outs.append(states if C_ is None else _read(C_, states))
        # One state per piece is what the gradient starts each piece from again.
        ctx.starts = starts if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(x, dt, A, B, C, starts[0] if starts else state, resets)
        if not outs:
            return (x.new_zeros((0, *state.shape)) if C is None else x.clone()), state.clone()
        return outs[0] if len(outs) == 1 else torch.cat(outs), state

    @staticmethod
    def backward(ctx, dy, dlast):  # type: ignore[override]
        x, dt, A, B, C, _, resets = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants gradients of these gradients
            return _differentiable_backward(ctx.saved_tensors, dy, dlast)
        pieces = _split(x, dt, B, C, resets, A)
        grads: list[list[Tensor | None]] = []
        dA, later = torch.zeros_like(A), dlast
        dys = dy.split(max(len(pieces[0][0]), 1)) if pieces else []
        for (x_, dt_, B_, C_, r_), start, dy_ in zip(
            reversed(pieces), reversed(ctx.starts), reversed(dys), strict=True
        ):
            decay, states = _states(x_, dt_, A, B_, r_, start)
            g = dy_.clone() if C_ is None else C_.unsqueeze(-1) * dy_.unsqueeze(-2)
            dC = None if C_ is None else _weigh(states, dy_)
            later = _run_back(g, decay, later)
            dx, dB = _read(B_, g), _weigh(g, x_)
            # d(log decay) = g * decay * state before; the state after last is not needed any more.
            slope = decay.mul_(g)
            slope[1:].mul_(states[:-1])
            slope[0].mul_(start)
            ddt = (slope * A).sum(-2)
            dA += slope.mul_(dt_.unsqueeze(-2)).sum((0, 1))
            grads.append([dx, ddt, dB, dC])
        if not grads:
            return torch.zeros_like(x), torch.zeros_like(dt), dA, torch.zeros_like(B), C, dlast, None
        dx, ddt, dB = (torch.cat([part[i] for part in reversed(grads)]) for i in range(3))  # type: ignore[misc]
        dC = None if C is None else torch.cat([part[3] for part in reversed(grads)])  # type: ignore[misc]
        return dx, ddt, dA, dB, dC, later, None


@run_eagerly  # traced, every token would become nodes of the graph
def run(x, dt, A, B, C, state, resets) -> tuple[Tensor, Tensor]:
    """Compute the scan piece by piece."""
    return _Pieces.apply(x, dt, A, B, C, state, resets)  # type: ignore[return-value]


def _states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, resets: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The decays and states (n, b, g, s, c) of one piece; no gradient flows."""
    decay = torch.exp(dt.unsqueeze(-2) * A)
    if resets is not None:
        decay.masked_fill_(resets, 0.0)
    states = B.unsqueeze(-1) * x.unsqueeze(-2)
    for h, a in zip(states.unbind(0), decay.unbind(0), strict=True):
        state = h.addcmul_(a, state)
    return decay, states


def _run_back(g: Tensor, decay: Tensor, later: Tensor) -> Tensor:
    """Turn gradients of states as read into gradients of states, in place; return that of the state before."""
    seeds, decays = g.unbind(0), decay.unbind(0)
    after = seeds[-1].add_(later)
    for seed, a in zip(reversed(seeds[:-1]), reversed(decays[1:]), strict=True):
        after = seed.addcmul_(a, after)
    return decays[0] * after


def _read(C: Float[Tensor, "n b g s"], states: Float[Tensor, "n b g s c"]) -> Float[Tensor, "n b g c"]:
    return (C.unsqueeze(-2) @ states).squeeze(-2)


def _weigh(states: Float[Tensor, "n b g s c"], x: Float[Tensor, "n b g c"]) -> Float[Tensor, "n b g s"]:
    # Not `states @ x`: torch makes a loop of copies of a batch of matrix-vector products, 20 times slower.
    return torch.einsum("nbgsc,nbgc->nbgs", states, x)


def _split(x: Tensor, dt: Tensor, B: Tensor, C: Tensor | None, resets: Tensor | None, A: Tensor) -> list:
    """The pieces: (x, dt, B, C, resets) of as many tokens as fit `TOGETHER`, at least 16."""
    entries = x.shape[1] * x.shape[2] * A.shape[1] * A.shape[2]
    tokens = max(16, TOGETHER // max(entries, 1))
    xs = x.split(tokens) if len(x) else ()
    Cs = [None] * len(xs) if C is None else C.split(tokens)
    rs = [None] * len(xs) if resets is None else resets.split(tokens)
    return list(zip(xs, dt.split(tokens), B.split(tokens), Cs, rs, strict=False))


def recurrent(x, dt, A, B, C, state, resets):
    """The plain loop, differentiable by autograd; all arguments as in `run`."""
    outs = []
    for t in range(len(x)):
        decay = torch.exp(dt[t].unsqueeze(-2) * A)
        if resets is not None:
            decay = decay.masked_fill(resets[t], 0.0)
        state = decay * state + B[t].unsqueeze(-1) * x[t].unsqueeze(-2)
        outs.append(state if C is None else (C[t].unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outs) if outs else torch.zeros_like(x)), state


def reference(x, dt, A, B, C, state, resets):
    """Every weight written out: y_i = sum_{j<=i} sum_s C_i[s] exp(A[s] (dt_{j+1} + ... + dt_i)) B_j[s] x_j."""
    steps = torch.einsum("nbgc,gsc->bgsnc", dt, A).flatten(1, 2)
    if resets is not None:
        steps = steps.masked_fill(resets[:, :, 0, 0, 0].T[:, None, :, None], -torch.inf)
    weights = log_weights(steps).exp().unflatten(1, A.shape[:2])
    begin = steps.cumsum(2).exp().unflatten(1, A.shape[:2])
    pairs = torch.einsum("bgsijc,jbgs,jbgc->ibgsc", weights, B, x)
    states = pairs + torch.einsum("bgsic,bgsc->ibgsc", begin, state)
    return _read(C, states), states[-1] if len(states) else state


def _differentiable_backward(saved, dy: Tensor, dlast: Tensor):
    """The gradients of the plain loop, themselves differentiable."""
    # Views, so that a gradient ends here although one argument may have been made from another.
    args = [None if x is None else x.view_as(x) for x in saved[:-1]]
    wanted = [x for x in args if x is not None and x.requires_grad]
    outputs = recurrent(*args, saved[-1])  # pyright: ignore[reportCallIssue]
    grads = iter(torch.autograd.grad(outputs, wanted, (dy, dlast), create_graph=True, allow_unused=True))
    return (*(next(grads) if x is not None and x.requires_grad else None for x in args), None)
