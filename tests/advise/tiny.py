"""A workload and mechanisms small enough for tests: a whole comparison in a second or two."""

import torch

from foveate.core.errors import UnsupportedError, bad
from foveate.core.grid import Grid
from foveate.core.registry import Facts
from foveate.models.backbone import NetSpec
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for
from tests.measure.toys import BrokenAttention, ToyAttention


class Tiny(Workload):
    """Is the left half brighter than the right?"""

    key = "image"
    title = "is the left half brighter?"
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, *, causal: bool = False):
        grid = Grid(16) if causal else Grid(4, 4)
        self.spec = NetSpec(
            inputs="ids" if causal else "pixels",
            grid=grid,
            in_features=4 if causal else 1,
            out_features=1,
            dim=8,
            heads=2,
            depth=1,
            causal=causal,
        )
        self.recipe = Recipe(batch_size=8, warmup=2)

    def options(self):
        return {}

    def _make(self, size, generator):
        if self.spec.causal:
            x = torch.randint(4, (size, 16), generator=generator)
            y = (x[:, :8].float().mean(1) > x[:, 8:].float().mean(1)).float()
            return Batch(x, y)
        x = torch.randn(size, 1, 4, 4, generator=generator)
        return Batch(x, (x[..., :2].mean((1, 2, 3)) > x[..., 2:].mean((1, 2, 3))).float())

    def batch(self, step, *, seed=0, size=None):
        return self._make(size or self.recipe.batch_size, generator_for(seed, step))

    def test_batches(self, size):
        yield self._make(64, generator_for(99))

    def loss(self, output, batch):
        logit = output.mean((1, 2))
        return torch.nn.functional.binary_cross_entropy_with_logits(logit, batch.targets.to(logit))

    def scores(self, output, batch):
        return {"quality": ((output.mean((1, 2)) > 0) == (batch.targets > 0.5)).float()}

    def baselines(self):
        return {"coin": 0.5}

    def trivial(self):
        return {"coin": 0.5}


class Good(ToyAttention):
    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        return cls(dim, radius=4, causal=causal)


class Refuses(ToyAttention):
    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        raise bad("grid", grid, "three axes")


class NotCausal(ToyAttention):
    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        if causal:
            raise UnsupportedError("its windows hold later tokens")
        return cls(dim, radius=3)


class Cheats(ToyAttention):
    """Says it is causal and is not."""

    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        return cls(dim, radius=3)


class Wrong(BrokenAttention):
    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        return cls(dim)


class Explodes(ToyAttention):
    """Works on small grids only."""

    @classmethod
    def for_workload(cls, *, dim, grid, heads, causal=False):
        return cls(dim, radius=2)

    def forward(self, x, grid):
        if grid.numel > 1024:
            raise RuntimeError("out of memory, says the toy")
        return super().forward(x, grid)


def toy_facts(key, cls, **more):
    known = {
        "title": "A toy",
        "arxiv": "",
        "year": 2024,
        "family": "local",
        "role": "pattern",
        "cost": "O(N)",
    }
    return Facts(key=key, cls=cls, **(known | more))


TOYS = {
    "toy_good": toy_facts("toy_good", Good, causal="optional"),
    "toy_refuses": toy_facts("toy_refuses", Refuses),
    "toy_not_causal": toy_facts("toy_not_causal", NotCausal),
    "toy_cheats": toy_facts("toy_cheats", Cheats, causal="optional"),
    "toy_wrong": toy_facts("toy_wrong", Wrong),
    "toy_explodes": toy_facts("toy_explodes", Explodes),
}
