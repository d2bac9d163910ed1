"""How far a mechanism's output is from full attention with the same parameters, where that means something.

It means something when the mechanism has full attention's own projections: then both get the same weights
and the same input, whatever the mechanism adds (bias tables, convolutions) is set to zero, and what differs
is only who attends to whom and by which rule. Random weights attend to everything alike, which no trained
network does; so keys are given the weights of queries, and tokens attend to what resembles them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.core.grid import Grid
from foveate.measure.subject import Subject


def smooth_tokens(grid: Grid, dim: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Tokens (B, N, C) whose neighbours resemble each other, as in pictures: random plane waves and noise."""
    generator = torch.Generator().manual_seed(seed)
    where = grid.coords().double() / max(grid.sizes)
    waves = 2.0 * torch.pi * torch.randn(batch, grid.ndim, dim, generator=generator, dtype=torch.float64)
    phase = 2.0 * torch.pi * torch.rand(batch, 1, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, grid.numel, dim, generator=generator, dtype=torch.float64)
    return (1.4 * torch.sin(where @ waves + phase) + 0.3 * noise).float()


def _attend_to_likeness(parameters: Mapping[str, Tensor]) -> None:
    """Set key weights equal to query weights, doubled, where they stand in one matrix (3C, C)."""
    for name, weight in parameters.items():
        if name.endswith("qkv.weight") and weight.shape[0] == 3 * weight.shape[1]:
            query, key, _ = weight.chunk(3)
            query.mul_(2.0)
            key.copy_(query)


def error_against_full(subject: Subject, full: Subject, *, seed: int = 0) -> float | None:
    """Relative L2 distance of the outputs, 0 for equal ones.

    Args:
        subject: the mechanism; its parameters are overwritten by those of `full`, the others by zero.
        full: full attention of the same size; its query and key weights are changed.
        seed: of the input.

    Returns:
        ||y - y_full|| / ||y_full||, or None when the mechanism does not hold every parameter of full
        attention under the same name and shape, or works in another layout.
    """
    if subject.layout != full.layout or subject.dim != full.dim or subject.grid != full.grid:
        return None
    own = dict(subject.module.named_parameters())
    shared = dict(full.module.named_parameters())
    if any(name not in own or own[name].shape != value.shape for name, value in shared.items()):
        return None
    subject.module.eval()
    full.module.eval()
    with torch.no_grad():
        _attend_to_likeness(shared)
        for name, value in own.items():
            value.copy_(shared[name]) if name in shared else value.zero_()
        x = full.arrange(smooth_tokens(full.grid, full.dim, seed=seed).to(full.device))
        wanted = full(x)
        got = subject(x)
        return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
