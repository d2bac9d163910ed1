"""Draws docs/img/dependency_tree.png: the forest that reversed attention induces on a photograph.

    python -m benchmarks.dependency_tree             train for about a minute on two cores, then draw
    python -m benchmarks.dependency_tree --steps 50  less

The authors published no weights, so a small `DependencyTrunk` is trained here, to restore hidden patches of three
photographs that come with scikit-image, and asked about a fourth it has never seen. Needs scikit-image and
matplotlib. What is drawn is what `DependencyTrunk.parents` and `chain` return: every patch in the mean colour of its
subtree, with the share of the variance of colours that lies between subtrees, and that between random sets of the
same sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.mechanisms.scored.dependency_vit import DependencyTrunk, chain, edges

PAGE = Path(__file__).parents[1] / "docs" / "img" / "dependency_tree.png"
SIDE, PATCH, DIM, DEPTH, HEADS = 14, 8, 64, 4, 4
LESSONS, EXAM = ("astronaut", "coffee", "rocket"), "chelsea"


class Restorer(nn.Module):
    """A trunk between a patch embedding and a map back to pixels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, DIM)
        self.hidden = nn.Parameter(torch.zeros(DIM))
        self.place = nn.Parameter(torch.randn(SIDE**2, DIM) * 0.1)
        self.trunk = DependencyTrunk(dim=DIM, heads=HEADS, depth=DEPTH, mlp_ratio=2.0, layer_scale=None)
        self.paint = nn.Linear(DIM, 3 * PATCH**2)

    def tokens(self, patches: Float[Tensor, "b n p"], hide: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """Return the tokens of patches, some of them hidden."""
        x = self.embed(patches - 0.5)
        x = x if hide is None else torch.where(hide.unsqueeze(-1), self.hidden, x)
        return x + self.place

    def forward(self, patches: Float[Tensor, "b n p"], hide: Tensor) -> Float[Tensor, "b n p"]:
        """Return all patches as restored from those not hidden."""
        x, messages = self.tokens(patches, hide), None
        for block in self.trunk.blocks:
            x, messages = block(x, messages)
        return self.paint(self.trunk.norm(x))


def photograph(name: str, zoom: int = 1) -> Float[Tensor, "3 h w"]:
    """Return a photograph of scikit-image, its shorter side 1.2 times what the model sees (times `zoom`)."""
    from skimage import data

    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255
    scale = 1.2 * zoom * SIDE * PATCH / min(image.shape[1:])
    return functional.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0]


def exam(zoom: int = 1) -> Float[Tensor, "3 h w"]:
    """Return the part of the fourth photograph that the model is asked about."""
    image, size = photograph(EXAM, zoom), SIDE * PATCH * zoom
    left = (image.shape[2] - size) // 2
    return image[:, :size, left : left + size]


def cut(images: list[Tensor], count: int, generator: torch.Generator) -> Float[Tensor, "b n p"]:
    """Return patches of random crops."""
    size, crops = SIDE * PATCH, []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        top, left = (int(torch.randint(s - size + 1, (), generator=generator)) for s in image.shape[1:])
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop)
    return patches_of(torch.stack(crops))


def patches_of(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n p"]:
    """Cut images into patches, row-major."""
    return functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def train(steps: int) -> Restorer:
    """Return a model that has learned to restore hidden patches."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = [photograph(name) for name in LESSONS]
    model = Restorer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        patches = cut(images, 8, generator)
        hide = torch.rand(patches.shape[:2], generator=generator) < 0.5
        loss = (model(patches, hide) - patches)[hide].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: mean squared error of hidden patches {loss.item():.4f}", flush=True)
    return model.eval()


def explained(colours: Float[Tensor, "n c"], place: Int[Tensor, "n"]) -> float:
    """Return the share of the colours' variance that lies between subtrees: 1 when each is of one colour."""
    means = painted(colours, place)
    return float((means - colours.mean(0)).square().sum() / (colours - colours.mean(0)).square().sum())


def painted(colours: Float[Tensor, "n c"], place: Int[Tensor, "n"]) -> Float[Tensor, "n c"]:
    """Return every token in the mean colour of its subtree."""
    sums = torch.zeros_like(colours).index_add_(0, place, colours)
    return (sums / place.bincount(minlength=len(place)).clamp_min(1).unsqueeze(1))[place]


def draw(model: Restorer, path: Path) -> None:
    """Write the photograph, its parents in the first layer, and the forest's levels up to its root."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    patches = patches_of(exam()[None])
    with torch.no_grad():
        levels = chain(model.trunk.parents(model.tokens(patches)))[:, 0]
    colours = patches[0].unflatten(1, (3, -1)).mean(-1)
    counts = [len(place.unique()) for place in levels]
    shown = [level for level in range(1, DEPTH + 1) if counts[level - 1] > 1]
    figure, axes = plt.subplots(1, 2 + len(shown), figsize=(2.4 * (2 + len(shown)), 2.9), dpi=90)
    for axis in axes:
        axis.set_axis_off()
        axis.set_xlim(0, SIDE)
        axis.set_ylim(SIDE, 0)
    sharp, extent = exam(3).permute(1, 2, 0).numpy().clip(0, 1), (0, SIDE, SIDE, 0)
    axes[0].imshow(sharp, extent=extent)
    axes[0].set_title("photograph", fontsize=9)
    axes[1].imshow(sharp, extent=extent, alpha=0.4)
    for _, child, parent in edges(levels[:2]).tolist():
        ends = [(i % SIDE + 0.5, i // SIDE + 0.5) for i in (child, parent)]
        axes[1].plot(*zip(*ends, strict=True), color="#b00040", linewidth=0.5)
    axes[1].set_title("parents in layer 1", fontsize=9)
    generator = torch.Generator().manual_seed(0)
    for axis, level in zip(axes[2:], shown, strict=True):
        place = levels[level]
        axis.imshow(
            painted(colours, place).reshape(SIDE, SIDE, 3).numpy(), extent=extent, interpolation="nearest"
        )
        shuffled = place[torch.randperm(len(place), generator=generator)]
        share, chance = explained(colours, place), explained(colours, shuffled)
        what = "root" if counts[level] == 1 else f"{counts[level]} subtrees"
        axis.set_title(f"layer {level}: {what}\n{share:.0%} of colour (shuffled {chance:.0%})", fontsize=8)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.86, wspace=0.05)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    shrink(path)
    print(f"wrote {path.name}: {', '.join(map(str, counts))} nodes per level")


def shrink(path: Path) -> None:
    """Keep 160 colours of a picture, for the size of the repository."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dependency_tree", description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--out", type=Path, default=PAGE, help="the picture")
    options = parser.parse_args(arguments)
    draw(train(options.steps), options.out)


if __name__ == "__main__":
    main()
