"""`image`: two handwritten digits somewhere on a canvas of strokes; what are they, and do they match?

Real 8x8 digits (scikit-learn's copy of the UCI handwritten digits) are pasted at two random places far
apart, among straight strokes. Three questions are asked at the tokens
a digit covers, so that the place of the question is the marker:

- `digit`: which digit stands here (detail),
- `other`: which digit stands at the other place (distance; asked where the two differ, so that knowing
  one's own digit does not help),
- `match`: do the two match (detail and distance).

The headline is the mean accuracy over the three. A purely local mechanism can only earn the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad, need_extra
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for

DIGIT = 8
TRAIN_DIGITS = 1297  # of 1797; the networks never see the other 500 before the test
TEST_SEED = 20_000_003


@cache
def load_digits() -> tuple[Float[Tensor, "n 8 8"], Int[Tensor, "n"]]:
    """Return scikit-learn's digits in [0, 1] and their classes, in a fixed shuffled order.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise need_extra("sklearn", "compare") from error
    pixels, classes = load(return_X_y=True)
    order = torch.randperm(len(classes), generator=generator_for(1))
    images = torch.as_tensor(pixels).float().view(-1, DIGIT, DIGIT) / 16.0
    return images[order], torch.as_tensor(classes).long()[order]


class ImageWorkload(Workload):
    """Digits among strokes: three questions of detail and distance. Targets (B, 2, 3), where (B, 2, N).

    Args:
        canvas: side of the square image, in pixels.
        patch: side of one token's patch, 1 or 2.
        strokes: straight distractor strokes per image.
        test_size: held-out images.
        dim, heads, depth: size of the network.

    Raises:
        ArgumentError: a canvas too small or not a multiple of the patch, a patch above 2.
    """

    key = "image"
    title = "two digits among distractor strokes: which are they, and do they match?"
    metric = "accuracy"

    def __init__(
        self,
        *,
        canvas: int = 32,
        patch: int = 2,
        strokes: int = 4,
        test_size: int = 400,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
    ):
        if patch not in (1, 2):
            raise bad("patch", patch, "1 or 2", "Larger patches would hide the distance the task asks about.")
        if canvas < 32 or canvas % patch:
            raise bad("canvas", canvas, f"at least 32 pixels and a multiple of patch={patch}")
        if test_size < 2:
            raise bad("test_size", test_size, "at least 2 images")
        if strokes < 0:
            raise bad("strokes", strokes, "zero or more")
        self.canvas, self.patch, self.strokes = canvas, patch, strokes
        self.test_size = test_size
        self.spec = NetSpec(
            inputs="pixels",
            grid=Grid(canvas // patch, canvas // patch),
            in_features=1,
            out_features=10 + 10 + 2,
            patch=patch,
            overlap=(DIGIT - patch) // 2,  # a patch's embedding looks as far as a digit is wide
            dim=dim,
            heads=heads,
            depth=depth,
        )
        self.recipe = Recipe(lr=8e-3)
        self._test: Batch | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that make this instance."""
        spec = self.spec
        return {
            "canvas": self.canvas,
            "patch": self.patch,
            "strokes": self.strokes,
            "test_size": self.test_size,
            "dim": spec.dim,
            "heads": spec.heads,
            "depth": spec.depth,
        }

    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return training images: digits from the first 1297 only."""
        return self._draw(size or self.recipe.batch_size, generator_for(seed, step), slice(0, TRAIN_DIGITS))

    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield the held-out images, made of the 500 digits never trained on."""
        if self._test is None:
            self._test = self._draw(self.test_size, generator_for(TEST_SEED), slice(TRAIN_DIGITS, None))
        for i in range(0, self.test_size, size):
            yield Batch(*(t[i : i + size] for t in self._test))  # type: ignore[union-attr]

    def _draw(self, n: int, g: torch.Generator, part: slice) -> Batch:
        digits, classes = (t[part] for t in load_digits())
        size = self.canvas
        first = torch.randint(len(digits), (n,), generator=g)
        second = torch.randint(len(digits), (n,), generator=g)
        # Half of the pairs match: for those the second is drawn among the first's own class.
        by_class = torch.argsort(classes, stable=True)
        counts = torch.bincount(classes, minlength=10)
        starts = counts.cumsum(0) - counts
        own = classes[first]
        pick = (torch.rand(n, generator=g) * counts[own]).long()
        wanted = torch.rand(n, generator=g) < 0.5
        # An unwanted match by chance moves on to the next class.
        moved = (own + 1 + (torch.rand(n, generator=g) * 9).long()) % 10
        other = by_class[starts[moved] + (torch.rand(n, generator=g) * counts[moved]).long()]
        second = torch.where(
            wanted, by_class[starts[own] + pick], torch.where(classes[second] == own, other, second)
        )
        places = self._places(n, g)
        canvas = self._clutter(n, g)
        ids = torch.stack((first, second), dim=1)
        span = torch.arange(DIGIT)
        rows = places[:, :, 0, None, None] + span[:, None]
        cols = places[:, :, 1, None, None] + span
        image = torch.arange(n)[:, None, None, None]
        # A digit replaces what it stands on, so that both are whole.
        canvas[image, rows, cols] = digits[ids]
        covered = torch.zeros(n, 2, size, size)
        covered[image, torch.arange(2)[None, :, None, None], rows, cols] = 1.0
        where = F.max_pool2d(covered, self.patch).flatten(2)
        here = classes[ids]
        match = (here[:, :1] == here[:, 1:]).long().expand(-1, 2)
        there = torch.where(match == 1, -100, here.flip(1))
        targets = torch.stack((here, there, match), dim=2)
        return Batch((canvas[:, None] - 0.1) * 4.0, targets, where)

    def _places(self, n: int, g: torch.Generator) -> Int[Tensor, "n 2 2"]:
        """Top-left corners of two digits at least half a canvas apart along some axis."""
        room = self.canvas - DIGIT + 1
        apart = self.canvas // 2
        low = (torch.rand(n, generator=g) * (room - apart)).long()
        high = low + apart + (torch.rand(n, generator=g) * (room - apart - low)).long()
        free = torch.randint(room, (n, 2), generator=g)
        corners = torch.stack((torch.stack((low, high), 1), free), dim=2)
        swap_axes = torch.rand(n, generator=g) < 0.5
        corners = torch.where(swap_axes[:, None, None], corners.flip(2), corners)
        swap_digits = torch.rand(n, generator=g) < 0.5
        return torch.where(swap_digits[:, None, None], corners.flip(1), corners)

    def _clutter(self, n: int, g: torch.Generator) -> Float[Tensor, "n s s"]:
        """A canvas with strokes of random place, direction and darkness."""
        size = self.canvas
        canvas = torch.zeros(n, size, size)
        image = torch.arange(n)
        if self.strokes:
            begin = torch.rand(n, self.strokes, 1, 2, generator=g) * size
            angle = torch.rand(n, self.strokes, 1, 1, generator=g) * torch.pi
            length = 4 + 6 * torch.rand(n, self.strokes, 1, 1, generator=g)
            along = torch.linspace(0, 1, 12)[:, None] * length
            points = begin + along * torch.cat((angle.sin(), angle.cos()), dim=-1)
            points = points.long().clamp(0, size - 1)
            dark = (0.4 + 0.6 * torch.rand(n, self.strokes, 1, generator=g)).expand(-1, -1, 12)
            canvas[image[:, None, None], points[..., 0], points[..., 1]] = dark
        return canvas

    def _answers(self, output: Float[Tensor, "b n out"], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean answer over the tokens of each digit, split by question: (B, 2, 10), (B, 2, 10), (B, 2, 2)."""
        assert batch.where is not None
        share = batch.where.to(output.dtype)
        pooled = (share / share.sum(dim=-1, keepdim=True)) @ output
        here, there, match = pooled.split((10, 10, 2), dim=-1)
        return here, there, match

    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Sum of the three questions' cross-entropies."""
        parts = zip(self._answers(output, batch), batch.targets.unbind(2), strict=True)
        return sum(
            (F.cross_entropy(a.flatten(0, 1), t.flatten(), ignore_index=-100) for a, t in parts),
            start=output.new_zeros(()),
        )

    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """Accuracies per image: `digit`, `other` (NaN where the digits match), `match`, and their mean."""
        scores = {}
        for name, answer, target in zip(
            ("digit", "other", "match"), self._answers(output, batch), batch.targets.unbind(2), strict=True
        ):
            right = (answer.argmax(-1) == target).double().mean(1)
            scores[name] = torch.where((target == -100).any(1), torch.nan, right)
        scores["quality"] = torch.stack(list(scores.values())).nanmean(0)
        return scores

    def trivial(self) -> dict[str, float]:
        """Majority class of every question, counted on training images, scored on the held-out ones."""
        return {"majority": self._constant()}

    def _constant(self) -> float:
        train = self.batch(0, seed=TEST_SEED, size=2048)
        answer = torch.zeros(1, 22)
        for start, count, targets in zip((0, 10, 20), (10, 10, 2), train.targets.unbind(2), strict=True):
            kept = targets[targets != -100]
            answer[0, start + int(torch.bincount(kept, minlength=count).argmax())] = 1.0
        n = self.grid.numel
        return self.evaluate(lambda x: answer.expand(len(x), n, 22)).quality
