"""`image` on one's own pictures: a folder with one sub-folder per class; which class is it?

The trivial answer is the most frequent class.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec
from foveate.tasks import photos
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for

HELD_OUT = 5  # every fifth picture of a class


class PicturesWorkload(Workload):
    """Classification of the user's pictures, resized to one canvas. Targets (B,).

    Args:
        folder: the folder; every sub-folder with images is a class.
        canvas: side all pictures are resized to.
        patch: side of one token's patch.
        dim, heads, depth: size of the network.

    Raises:
        ArgumentError: fewer than two classes, or a class with fewer than two pictures.
    """

    key = "image"
    title = "your pictures: which class is it?"
    metric = "accuracy"

    def __init__(
        self,
        *,
        folder: str | Path,
        canvas: int = 32,
        patch: int = 2,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
    ):
        if patch < 1 or canvas < 4 * patch or canvas % patch:
            raise bad("canvas", canvas, f"a multiple of patch={patch}, at least 4 patches long")
        self.folder, self.canvas, self.patch = str(folder), canvas, patch
        images, labels, self.classes = self._read(self.folder)
        test = torch.zeros(len(labels), dtype=torch.bool)
        for c in range(len(self.classes)):
            test[(labels == c).nonzero()[::HELD_OUT, 0]] = True
        mean, std = images[~test].mean((0, 2, 3), keepdim=True), images[~test].std((0, 2, 3), keepdim=True)
        images = (images - mean) / std.clamp_min(1e-3)
        self.train = images[~test], labels[~test]
        self.test = images[test], labels[test]
        self.spec = NetSpec(
            inputs="pixels",
            grid=Grid(canvas // patch, canvas // patch),
            in_features=3,
            out_features=len(self.classes),
            patch=patch,
            overlap=patch,
            dim=dim,
            heads=heads,
            depth=depth,
        )
        self.recipe = Recipe()

    def _read(self, folder: str) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, "n"], list[str]]:
        groups: dict[str, list] = {}
        for path in photos.files_in(folder):
            groups.setdefault(path.parent.name, []).append(path)
        few = sorted(name for name, paths in groups.items() if len(paths) < 2)
        if len(groups) < 2 or few:
            raise bad(
                "folder",
                folder,
                "a folder with at least two sub-folders (classes) of two or more images each",
                f"Too few images in: {', '.join(few)}."
                if few
                else f"Sub-folders with images: {len(groups)}.",
            )
        classes = sorted(groups)
        size = (self.canvas, self.canvas)
        images, labels = [], []
        for label, name in enumerate(classes):
            for path in groups[name]:
                picture = photos.read(path)[None]
                images.append(F.interpolate(picture, size, mode="bilinear", antialias=True)[0])
                labels.append(label)
        return torch.stack(images), torch.tensor(labels), classes

    def options(self) -> dict[str, Any]:
        """Return the options that make this instance."""
        spec = self.spec
        return {
            "folder": self.folder,
            "canvas": self.canvas,
            "patch": self.patch,
            "dim": spec.dim,
            "heads": spec.heads,
            "depth": spec.depth,
        }

    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return random training pictures, half of them mirrored."""
        images, labels = self.train
        g = generator_for(seed, step)
        n = size or self.recipe.batch_size
        ids = torch.randint(len(labels), (n,), generator=g)
        mirrored = (torch.rand(n, generator=g) < 0.5)[:, None, None, None]
        return Batch(torch.where(mirrored, images[ids].flip(-1), images[ids]), labels[ids])

    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield every held-out picture."""
        for images, labels in zip(self.test[0].split(size), self.test[1].split(size), strict=True):
            yield Batch(images, labels)

    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Cross-entropy of the mean answer over all tokens."""
        return F.cross_entropy(output.mean(1), batch.targets)

    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """Whether each picture's class is right."""
        return {"quality": (output.mean(1).argmax(-1) == batch.targets).double()}

    def trivial(self) -> dict[str, float]:
        """The most frequent class of the training pictures."""
        most = int(torch.bincount(self.train[1]).argmax())
        return {"majority": (self.test[1] == most).double().mean().item()}
