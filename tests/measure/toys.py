"""Small mechanisms with known behaviour, for tests of the measuring code."""

import torch
from torch import nn

from foveate.core.grid import Grid
from foveate.measure.subject import Subject


class ToyAttention(nn.Module):
    """Softmax attention over all tokens, or over those within `radius`; `causal` hides the future."""

    def __init__(self, dim: int, *, radius: int | None = None, causal: bool = False, backend: str = "auto"):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.radius, self.causal, self.backend = radius, causal, backend

    def noise(self, y):
        return y

    def forward(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        gap = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        if self.radius is not None:
            logits = logits.masked_fill(gap.abs() > self.radius, float("-inf"))
        if self.causal:
            logits = logits.masked_fill(gap < 0, float("-inf"))
        y = self.proj(logits.softmax(-1) @ v)
        return y if self.backend == "reference" else self.noise(y)


class BrokenAttention(ToyAttention):
    """A fast path with a wrong answer."""

    def noise(self, y):
        return y * 1.001


class NanAttention(ToyAttention):
    def noise(self, y):
        return torch.where(torch.arange(y.shape[1])[:, None] == 0, torch.nan, y)


class BatchAttention(ToyAttention):
    """Mixes samples, as batch statistics do."""

    def forward(self, x, grid):
        return super().forward(x, grid) + 0.1 * x.mean(0, keepdim=True)


class SpatialGate(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return x * self.conv(x)


def toy(cls=ToyAttention, *, grid=None, dim: int = 8, **options) -> Subject:
    grid = grid if grid is not None else Grid(4, 5)
    return Subject("toy", cls(dim, **options), grid, dim)


def gate_toy(grid=None, dim: int = 8) -> Subject:
    return Subject("gate", SpatialGate(dim), grid if grid is not None else Grid(4, 5), dim, "spatial")
