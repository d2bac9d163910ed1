"""Mixers and a toy workload for tests of training and racing: small enough for milliseconds."""

import torch
from torch import nn
from torch.nn import functional as F

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.models.backbone import Backbone, NetSpec
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for


class Dense(nn.Module):
    """Plain attention over all tokens."""

    def __init__(self, *, dim, grid, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, grid):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Mean(nn.Module):
    """Every token gets the mean of all."""

    def __init__(self, *, dim, grid, heads, causal):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x, grid):
        return self.out(x.mean(1, keepdim=True)).expand_as(x)


class Nothing(nn.Module):
    """No mixing at all."""

    def __init__(self, **where):
        super().__init__()

    def forward(self, x, grid):
        return torch.zeros_like(x)


class Crash(Nothing):
    """Raises in its third training step."""

    def forward(self, x, grid):
        self.calls = getattr(self, "calls", 0) + self.training
        if self.calls > 2:
            raise RuntimeError("boom")
        return x


class Explode(Nothing):
    """Its output is not finite."""

    def forward(self, x, grid):
        return x * float("inf")


class Picky(Nothing):
    """Cannot serve anything."""

    def __init__(self, **where):
        raise UnsupportedError("grid: only seven dimensions will do")


MIXERS = {
    "dense": Dense,
    "mean": Mean,
    "nothing": Nothing,
    "crash": Crash,
    "explode": Explode,
    "picky": Picky,
}


def build(key, spec, *, seed=0):
    """What `race` takes as `build`."""
    return Backbone(spec, MIXERS[key], seed=seed)


class Toy(Workload):
    """Is the number of marked tokens odd? Needs information from all tokens."""

    key = "toy"
    title = "toy"
    metric = "accuracy"

    def __init__(self):
        self.spec = NetSpec(
            inputs="ids", grid=Grid(6), in_features=2, out_features=2, dim=8, heads=2, depth=1
        )
        self.recipe = Recipe(batch_size=8, lr=1e-2, warmup=3)

    def options(self):
        return {"n": 6}

    def _draw(self, n, g):
        ids = torch.randint(2, (n, 6), generator=g)
        return Batch(ids, (ids.sum(1) > 2).long())

    def batch(self, step, *, seed=0, size=None):
        return self._draw(size or 8, generator_for(seed, step))

    def test_batches(self, size):
        yield from (self._draw(32, generator_for(999, i)) for i in range(2))

    def loss(self, output, batch):
        return F.cross_entropy(output[:, 0], batch.targets)

    def scores(self, output, batch):
        right = (output[:, 0].argmax(-1) == batch.targets).double()
        return {"quality": right, "half": right.masked_fill(batch.targets == 0, torch.nan)}

    def trivial(self):
        return {"majority": 0.6, "coin": 0.5}
