"""The recurrent form of the scan: one token after the other, with a state of constant size."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.scan.contract import ScanProblem


def advance(
    q: Float[Tensor, "b h dk"],
    k: Float[Tensor, "b h dk"],
    v: Float[Tensor, "b h dv"],
    decay: Tensor | None,
    state: Float[Tensor, "b h dk dv"],
) -> tuple[Float[Tensor, "b h dv"], Float[Tensor, "b h dk dv"]]:
    """Take one step of the recurrence. `decay` is the log decay (b|1, h|1, dk|1) of this step, or None."""
    pair = k.unsqueeze(-1) * v.unsqueeze(-2)
    state = pair + (state if decay is None else decay.exp().unsqueeze(-1) * state)
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def run(p: ScanProblem) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h dk dv"]]:
    """Compute outputs and final state in N sequential steps."""
    if p.n == 0:
        return p.v.new_zeros(p.v.shape), p.state
    steps = [None] * p.n if p.decay is None else p.decay.expand(-1, -1, p.n, -1).unbind(2)
    state, outs = p.state, []
    for q, k, v, g in zip(p.q.unbind(2), p.k.unbind(2), p.v.unbind(2), steps, strict=True):
        out, state = advance(q, k, v, g, state)
        if not p.inclusive:
            out = out - (q * k).sum(-1, keepdim=True) * v
        outs.append(out)
    return torch.stack(outs, dim=2), state
