"""What a workload is: data, loss, held-out scores, and the trivial answers they must beat."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad, unknown
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec


class Batch(NamedTuple):
    """Examples for one step.

    Attributes:
        inputs: what the network reads: images (B, C, *spatial) or ids (B, N).
        targets: what it should answer; the layout is the workload's own.
        where: which tokens are asked, or None; the layout is the workload's own.
    """

    inputs: Tensor
    targets: Tensor
    where: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; floating inputs also take `dtype`."""
        inputs = self.inputs.to(device, dtype if self.inputs.is_floating_point() else None)
        where = None if self.where is None else self.where.to(device)
        return Batch(inputs, self.targets.to(device), where)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained on a workload; the same for every mechanism.

    Attributes:
        batch_size: examples per step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up; constant afterwards, so that no length must be known beforehand.
        weight_decay: of matrices; vectors and position tables are not decayed.
        betas: AdamW's.
        clip: largest norm of the gradient.
        average: memory of the running mean of the weights that is evaluated, as a share of the steps done.
    """

    batch_size: int = 32
    lr: float = 3e-3
    warmup: int = 10
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    average: float = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Held-out quality of one trained network.

    Attributes:
        quality: mean of the headline metric over test examples.
        quality_se: its standard error over test examples, after what makes an example hard for everybody is
            taken out (`Workload.reference`).
        parts: means of the questions that make up the headline, by name.
        n: number of test examples.
    """

    quality: float
    quality_se: float
    parts: dict[str, float] = field(default_factory=dict)
    n: int = 0


class Workload(ABC):
    """A job to train for and be scored on. Instances are cheap; data is loaded on first use.

    Class attributes:
        key: the name users type.
        title: what the network is asked, as one sentence.
        metric: name of the headline metric, with its unit.
        higher_is_better: direction of the metric.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    spec: NetSpec
    recipe: Recipe
    _baselines: dict[str, float] | None = None

    @property
    def grid(self) -> Grid:
        """The token grid."""
        return self.spec.grid

    @property
    def causal(self) -> bool:
        """Whether only causal mechanisms may take part."""
        return self.spec.causal

    @abstractmethod
    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return the training batch of `step`; the same for every mechanism, another for every seed."""

    @abstractmethod
    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield the held-out examples, always the same, in batches of at most `size`."""

    @abstractmethod
    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Return the scalar training loss."""

    @abstractmethod
    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """Return scores (B,) of the examples by part; "quality" is the headline, NaN is a part not asked."""

    @abstractmethod
    def trivial(self) -> dict[str, float]:
        """Compute the quality of trivial answers from the same data, by name (see `baselines`)."""

    def reference(self, batch: Batch) -> Float[Tensor, "b"]:
        """Return what a trivial answer scores on every example; zeros where that says nothing.

        All networks and trivial answers are scored on the same examples, so that differences between examples
        must not count as noise between networks: the standard error is that of the lead over this answer.
        """
        return torch.zeros(len(batch.inputs))

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the options that make this instance, as plain JSON values."""

    def evaluate(self, predict: Callable[[Tensor], Tensor], *, size: int = 64) -> Evaluation:
        """Score `predict(inputs) -> output` on the held-out examples.

        Inputs are handed over on the CPU; `predict` moves them and returns its output anywhere.
        """
        kept: dict[str, list[Tensor]] = {}
        shared = []
        for batch in self.test_batches(size):
            output = predict(batch.inputs).float().cpu()
            for name, values in self.scores(output, batch).items():
                kept.setdefault(name, []).append(values.double())
            shared.append(self.reference(batch).double())
        scores = {name: torch.cat(values) for name, values in kept.items()}
        quality = scores.pop("quality")
        own = quality - torch.cat(shared)
        se = own.std().item() / math.sqrt(len(own)) if len(own) > 1 else math.nan
        parts = {name: values.nanmean().item() for name, values in scores.items()}
        return Evaluation(quality.mean().item(), se, parts, len(quality))

    def baselines(self) -> dict[str, float]:
        """Return the quality of trivial answers by name; computed once."""
        if self._baselines is None:
            self._baselines = self.trivial()
        return dict(self._baselines)

    def floor(self) -> tuple[str, float]:
        """Return name and quality of the best trivial answer."""
        table = self.baselines()
        best = (max if self.higher_is_better else min)(table, key=lambda name: table[name])
        return best, table[best]


def workload_keys() -> list[str]:
    """Return the keys of all workloads, in the order they are listed."""
    return ["image", "restore", "text", "recall", "shapes"]


def make_workload(key: str, **options: Any) -> Workload:
    """Build a workload by key with its own options.

    Bring your own: `image` takes `folder` (one sub-folder of images per class), `restore` takes `folder`
    (photographs), `text` takes `file`.

    Raises:
        UnknownNameError: with the nearest names.
        ArgumentError: an option whose value cannot work, or `shapes`, which learns nothing.
        MissingExtraError: a package that ships its data is not installed (on first use of the data).
    """
    if key not in workload_keys():
        raise unknown("workload", key, workload_keys())
    if key == "shapes":
        raise bad(
            "workload", key, "a workload that learns", "`shapes` only times: see `foveate.advise.shapes`."
        )
    # Imported on demand: listing the names must not cost the modules.
    if key == "image":
        from foveate.tasks.digits import ImageWorkload
        from foveate.tasks.pictures import PicturesWorkload

        return PicturesWorkload(**options) if options.get("folder") else ImageWorkload(**options)
    if key == "restore":
        from foveate.tasks.restore import RestoreWorkload

        return RestoreWorkload(**options)
    if key == "text":
        from foveate.tasks.text import TextWorkload

        return TextWorkload(**options)
    from foveate.tasks.recall import RecallWorkload

    return RecallWorkload(**options)


def generator_for(*numbers: int) -> torch.Generator:
    """Return a CPU generator fixed by `numbers` (seed, step, ...): order of use never matters."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        # One round of splitmix64 per number keeps neighbouring steps unrelated.
        mixed = (mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
