"""The quadratic form of the scan, every weight from query to key written out. Truth, slow on purpose."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.scan.contract import ScanProblem


def run(p: ScanProblem) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h dk dv"]]:
    """Compute outputs and final state in O(N^2) time and memory (times D_k for per-channel decay)."""
    decay = p.q.new_zeros(1, 1, 1, 1) if p.decay is None else p.decay
    g = decay.expand(-1, -1, p.n, -1)
    weights = log_weights(g).exp()
    if weights.shape[-1] == 1:
        scores = (p.q @ p.k.mT) * weights.squeeze(-1)
    else:
        scores = (p.q.unsqueeze(3) * weights * p.k.unsqueeze(2)).sum(-1)
    if not p.inclusive:
        scores = scores.tril(-1)
    out = scores @ p.v + (p.q * g.cumsum(2).exp()) @ p.state
    state = (p.k * log_until_end(g).exp()).mT @ p.v + g.sum(2).exp().unsqueeze(-1) * p.state
    return out, state


def log_weights(g: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n n c"]:
    """Return L[i, j] = g_{j+1} + ... + g_i for j <= i, and -inf for j > i.

    Summed directly, not as a difference of running totals: -inf minus -inf would be NaN, and
    differences of large totals would lose the small decays between them.
    """
    n = g.shape[2]
    i, j = torch.arange(n, device=g.device).view(-1, 1, 1), torch.arange(n, device=g.device).view(-1, 1)
    return torch.where(i > j, g.unsqueeze(3), 0.0).cumsum(2).masked_fill(i < j, -torch.inf)


def log_until_end(g: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n c"]:
    """Return g_{j+1} + ... + g_N for every j: what happens to the pair of token j until the end."""
    after = torch.cat([g[:, :, 1:], torch.zeros_like(g[:, :, :1])], dim=2)
    return after.flip(2).cumsum(2).flip(2)
