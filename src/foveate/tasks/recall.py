"""`recall`: multi-query associative recall. Pairs of key and value are shown, then keys are asked for again.

    k3 v7  k1 v2  k9 v2 ... | k1 k9 k9 k3 ...   ->   v2 v2 v2 v7 ...

The standard form (MQAR, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927)
with the answers to all questions in the loss. Causal. Which key has which value is new in every example, so nothing
can be learned by heart; a fixed-size state must hold all pairs at once, attention can look back.

A token's embedding looks at the token before it too, for every mechanism alike, as the short convolutions in front of
many linear-attention and state-space layers do: a value's token knows its key before any mechanism mixes anything.
With it full attention has solved the default task after 90 steps and linear attention follows by its means. With
`before=0` a mechanism has to discover looking one token back first, and neither had left the most shown value after
300 steps: a short race then measures how soon that happens and not what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for

TEST_SEED = 20_000_003


class RecallWorkload(Workload):
    """Recall of values by their keys. Targets (B, N): the value asked for, -100 while pairs are shown.

    Args:
        length: tokens per example, N.
        pairs: pairs shown; their 2 `pairs` tokens come first, the rest are questions.
        keys: size of the keys' vocabulary.
        values: size of the values' vocabulary; chance is 1 / values.
        test_size: held-out examples.
        before: tokens before its own that a token's embedding looks at.
        dim, heads, depth: size of the network.

    Raises:
        ArgumentError: more pairs than keys, or than leave room for a question.
    """

    key = "recall"
    title = "pairs of keys and values, then keys: which value belongs to each?"
    metric = "accuracy"

    def __init__(
        self,
        *,
        length: int = 128,
        pairs: int = 16,
        keys: int = 32,
        values: int = 16,
        test_size: int = 256,
        before: int = 1,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
    ):
        if not 1 <= pairs <= keys:
            raise bad("pairs", pairs, f"between 1 and keys={keys}")
        if length <= 2 * pairs:
            raise bad("length", length, f"more than the {2 * pairs} tokens of the pairs")
        if values < 2:
            raise bad("values", values, "at least 2")
        if test_size < 2:
            raise bad("test_size", test_size, "at least 2 examples")
        self.length, self.pairs, self.keys, self.values = length, pairs, keys, values
        self.test_size = test_size
        self.spec = NetSpec(
            inputs="ids",
            grid=Grid(length),
            in_features=keys + values,
            out_features=values,
            dim=dim,
            heads=heads,
            depth=depth,
            before=before,
            causal=True,
        )
        self.recipe = Recipe(batch_size=32, lr=6e-3)

    def options(self) -> dict[str, Any]:
        """Return the options that make this instance."""
        return {
            "length": self.length,
            "pairs": self.pairs,
            "keys": self.keys,
            "values": self.values,
            "test_size": self.test_size,
            "before": self.spec.before,
            "dim": self.spec.dim,
            "heads": self.spec.heads,
            "depth": self.spec.depth,
        }

    def _draw(self, n: int, g: torch.Generator) -> Batch:
        keys = torch.rand(n, self.keys, generator=g).argsort(1)[:, : self.pairs]
        values = torch.randint(self.values, (n, self.pairs), generator=g)
        asked = torch.randint(self.pairs, (n, self.length - 2 * self.pairs), generator=g)
        shown = torch.stack((keys, self.keys + values), dim=2).flatten(1)
        targets = torch.full((n, self.length), -100)
        targets[:, 2 * self.pairs :] = values.gather(1, asked)
        return Batch(torch.cat((shown, keys.gather(1, asked)), dim=1), targets)

    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return fresh examples."""
        return self._draw(size or self.recipe.batch_size, generator_for(seed, step))

    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield the held-out examples."""
        whole = self._draw(self.test_size, generator_for(TEST_SEED))
        for i in range(0, self.test_size, size):
            yield Batch(whole.inputs[i : i + size], whole.targets[i : i + size])

    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Cross-entropy of the value asked for."""
        return F.cross_entropy(output.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)

    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """Share of questions answered right in every example; `far`: in the last quarter of the sequence."""
        asked = slice(2 * self.pairs, None)
        right = (output[:, asked].argmax(-1) == batch.targets[:, asked]).double()
        return {"quality": right.mean(1), "far": right[:, -max(1, self.length // 4) :].mean(1)}

    def trivial(self) -> dict[str, float]:
        """Chance, and always naming the value that was shown most often in the example."""

        def majority(x: Tensor) -> Tensor:
            shown = x[:, 1 : 2 * self.pairs : 2] - self.keys
            votes = F.one_hot(shown, self.values).sum(1).double()
            return votes[:, None].expand(-1, self.length, -1)

        return {"chance": 1.0 / self.values, "most shown value": self.evaluate(majority).quality}
