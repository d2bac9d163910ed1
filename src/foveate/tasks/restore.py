"""`restore`: undo noise, or undo a halving of the resolution, on real photographs.

The network sees a damaged square of a photograph and answers, per token, what must be added to it.
Trained on some photographs and scored on others, by peak signal-to-noise ratio (PSNR, dB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad, need_extra
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec
from foveate.tasks import photos
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for

TEST_SEED = 20_000_003
# The network answers in units of this, so that its answers are of order one.
UNIT = 0.1
# Widths of the blurs that are tried as a trivial answer to noise, in pixels.
WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)


def halve_and_back(clean: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Halve the resolution (antialiased) and enlarge it again, both bicubic."""
    h, w = clean.shape[-2:]
    small = F.interpolate(clean, size=(h // 2, w // 2), mode="bicubic", antialias=True)
    return F.interpolate(small, size=(h, w), mode="bicubic").clamp(0, 1)


def blur(image: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
    """Gaussian blur with reflected borders."""
    radius = max(1, round(3 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=image.dtype) / sigma) ** 2)
    line = (line / line.sum()).expand(image.shape[1], 1, 1, -1)
    out = F.conv2d(F.pad(image, (radius, radius, 0, 0), "reflect"), line, groups=image.shape[1])
    return F.conv2d(F.pad(out, (0, 0, radius, radius), "reflect"), line.mT, groups=image.shape[1])


def psnr(image: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of every image, in dB, for pixels in [0, 1].

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio
    except ImportError as error:
        raise need_extra("torchmetrics", "compare") from error
    return peak_signal_noise_ratio(image, clean, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3))


class RestoreWorkload(Workload):
    """Denoising or x2 super-resolution of photographs. Targets: the clean squares (B, 3, side, side).

    Args:
        task: "denoise" or "upscale".
        side: side of a square, in pixels.
        patch: side of one token's patch; side / patch is the grid, at least 48 by 48.
        noise: standard deviation of the noise, for pixels in [0, 1].
        folder: a folder of one's own photographs instead of the bundled ones; every fourth is held out.
        test_size: held-out squares.
        dim, heads, depth: size of the network.

    Raises:
        ArgumentError: a value that cannot work, or a folder with too few or too small photographs.
    """

    key = "restore"
    title = "photographs with noise (or at half resolution): what was the clean picture?"
    metric = "PSNR (dB)"

    def __init__(
        self,
        *,
        task: Literal["denoise", "upscale"] = "denoise",
        side: int = 96,
        patch: int = 2,
        noise: float = 0.1,
        folder: str | Path | None = None,
        test_size: int = 24,
        dim: int = 48,
        heads: int = 3,
        depth: int = 2,
    ):
        if task not in ("denoise", "upscale"):
            raise bad("task", task, "'denoise' or 'upscale'")
        if patch < 1 or side % patch or side // patch < 48 or side % 2:
            raise bad("side", side, f"an even multiple of patch={patch}, at least 48 patches long")
        if noise <= 0:
            raise bad("noise", noise, "a positive standard deviation")
        if test_size < 2:
            raise bad("test_size", test_size, "at least 2 squares")
        self.task, self.side, self.patch, self.noise = task, side, patch, float(noise)
        self.folder, self.test_size = None if folder is None else str(folder), test_size
        self.spec = NetSpec(
            inputs="pixels",
            grid=Grid(side // patch, side // patch),
            in_features=3,
            out_features=3 * patch * patch,
            patch=patch,
            overlap=patch,
            dim=dim,
            heads=heads,
            depth=depth,
        )
        self.recipe = Recipe(batch_size=4, lr=3e-3)
        self._pictures: dict[str, Sequence[Tensor]] = {}
        self._test: Batch | None = None
        self._best_width: float | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that make this instance."""
        return {
            "task": self.task,
            "side": self.side,
            "patch": self.patch,
            "noise": self.noise,
            "folder": self.folder,
            "test_size": self.test_size,
            "dim": self.spec.dim,
            "heads": self.spec.heads,
            "depth": self.spec.depth,
        }

    def pictures(self, part: str) -> Sequence[Tensor]:
        """Return the photographs of `part`, "train" or "test"."""
        if not self._pictures:
            if self.folder is None:
                self._pictures = {name: photos.bundled(name) for name in ("train", "test")}
            else:
                self._pictures = self._own(self.folder)
        return self._pictures[part]

    def _own(self, folder: str) -> dict[str, Sequence[Tensor]]:
        paths = photos.files_in(folder)
        fit = [p for p in map(photos.read, paths) if min(p.shape[1:]) >= self.side]
        if len(fit) < 2:
            raise bad(
                "folder",
                folder,
                f"a folder with at least 2 photographs of {self.side} x {self.side} pixels or more",
                f"It has {len(paths)} images, {len(fit)} of them large enough.",
            )
        return {"test": fit[::4], "train": [p for i, p in enumerate(fit) if i % 4]}

    def _squares(self, part: str, n: int, g: torch.Generator) -> Float[Tensor, "n 3 s s"]:
        pictures, side = self.pictures(part), self.side
        out = torch.empty(n, 3, side, side)
        for i, draw in enumerate(torch.rand(n, 3, generator=g).tolist()):
            # The test takes the photographs in turn, so that each counts the same.
            picture = pictures[i % len(pictures) if part == "test" else int(draw[0] * len(pictures))]
            y, x = (int(u * (size - side + 1)) for u, size in zip(draw[1:], picture.shape[1:], strict=True))
            out[i] = picture[:, y : y + side, x : x + side]
        return out

    def _damage(self, clean: Float[Tensor, "b c h w"], g: torch.Generator) -> Float[Tensor, "b c h w"]:
        if self.task == "upscale":
            return halve_and_back(clean)
        return clean + self.noise * torch.randn(clean.shape, generator=g)

    def _draw(self, part: str, n: int, g: torch.Generator) -> Batch:
        clean = self._squares(part, n, g)
        return Batch((self._damage(clean, g) - 0.5) * 4.0, clean)

    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return damaged squares of training photographs at random places."""
        return self._draw("train", size or self.recipe.batch_size, generator_for(seed, step))

    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield damaged squares of the held-out photographs, few at a time: they are large."""
        if self._test is None:
            self._test = self._draw("test", self.test_size, generator_for(TEST_SEED))
        size = min(size, 2 * self.recipe.batch_size)
        for i in range(0, self.test_size, size):
            yield Batch(self._test.inputs[i : i + size], self._test.targets[i : i + size])

    def restored(self, output: Float[Tensor, "b n out"], batch: Batch) -> Float[Tensor, "b 3 s s"]:
        """Add the network's answer to what it saw."""
        h, w = self.grid.sizes
        p = self.patch
        change = output.view(-1, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, h * p, w * p)
        return self._seen(batch).to(output.dtype) + UNIT * change

    @staticmethod
    def _seen(batch: Batch) -> Tensor:
        """The damaged picture in [0, 1] units."""
        return batch.inputs / 4.0 + 0.5

    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Mean squared error, in units of `UNIT`."""
        return F.mse_loss(self.restored(output, batch) / UNIT, batch.targets / UNIT)

    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """PSNR of every square, clipped to [0, 1] as a viewer would see it."""
        return {"quality": psnr(self.restored(output, batch).clamp(0, 1), batch.targets)}

    def _width(self) -> float:
        """Width of the Gaussian blur that removes most noise from training photographs."""
        if self._best_width is None:
            train = self._draw("train", self.test_size, generator_for(TEST_SEED, 1))
            seen = self._seen(train)
            self._best_width = max(WIDTHS, key=lambda s: psnr(blur(seen, s), train.targets).mean().item())
        return self._best_width

    def reference(self, batch: Batch) -> Float[Tensor, "b"]:
        """PSNR of the blurred (for upscaling, the given) picture: smooth ones are easy for everybody."""
        seen = self._seen(batch)
        guess = seen if self.task == "upscale" else blur(seen, self._width())
        return psnr(guess.clamp(0, 1), batch.targets)

    def trivial(self) -> dict[str, float]:
        """PSNR of what the network is given; for noise also of the best Gaussian blur."""
        batch = Batch(*(torch.cat(t) for t in zip(*(b[:2] for b in self.test_batches(8)), strict=True)))
        given = psnr(self._seen(batch).clamp(0, 1), batch.targets).mean().item()
        if self.task == "upscale":
            return {"bicubic": given}
        return {"noisy input": given, "gaussian blur": self.reference(batch).mean().item()}
