"""Whom a mechanism listens to, found by experiment: the picture that stands beside its name.

The gradient of one output token with respect to every input token is taken at a random input; its size
per token, scaled to ten grey levels, is the picture. It needs nothing but the module, so a third party's
mechanism has one too, and routed mechanisms show the routes they took on that input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.measure.subject import Subject

LEVELS = 10


def reach_levels(subject: Subject, *, token: int | None = None, draws: int = 4, seed: int = 0) -> list[int]:
    """Return one level 0..9 per token: how strongly output `token` depends on each input token.

    Args:
        subject: the mechanism, best built on a small grid.
        token: which output; the middle of the grid when None.
        draws: random directions of the output that are averaged; the input stays the same.
        seed: of the input and the directions.

    Returns:
        N integers in token order. Level 0 means exactly no influence; the token's own influence, which
        mostly dwarfs the rest, does not set the scale.
    """
    n = subject.grid.numel
    if token is None:
        token = int(subject.grid.ravel([torch.tensor(s // 2) for s in subject.grid.sizes]))
    was_training = subject.module.training
    subject.module.eval()
    x = subject.sample(1, seed=seed).requires_grad_()
    out = subject.tokens(subject(x))[0, token]
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, dtype=torch.float64)
    for i in range(draws):
        direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        (gradient,) = torch.autograd.grad(out, x, direction, retain_graph=i + 1 < draws, allow_unused=True)
        if gradient is not None:
            total += subject.tokens(gradient)[0].detach().double().norm(dim=-1).cpu()
    subject.module.train(was_training)
    return _levels(total, token)


def _levels(strength: Tensor, token: int) -> list[int]:
    others = strength.clone()
    others[token] = 0.0
    top = others.max().item() or strength.max().item()
    if top == 0.0:
        return [0] * len(strength)
    # A square root keeps weak influence visible; anything above exact zero gets at least level 1.
    scaled = (strength / top).clamp(max=1.0).sqrt().mul(LEVELS - 1).round().long()
    seen = strength > 1e-9 * top
    return torch.where(seen, scaled.clamp(min=1), torch.zeros_like(scaled)).tolist()
