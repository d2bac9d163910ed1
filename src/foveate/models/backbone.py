"""One small pre-norm network for every mechanism, so that only the mechanism differs.

    x = embed(inputs) + position                      (B, N, C)
    x = x + mixer(norm(x));  x = x + mlp(norm(x))     depth times
    answer = head(norm(x))                            (B, N, out_features)

With `before` = w, embed(ids)_t = E_0[ids_t] + ... + E_w[ids_(t-w)]: a causal convolution over the tokens themselves,
outside the mixers and the same for all of them.
Everything but the mixers starts from the same numbers for the same seed, whatever the mixers are.
Position enters once, as a learned table that starts from sines and cosines of the coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from itertools import count
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import get_system

MixerFactory = Callable[..., nn.Module]


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """What a network reads, what it answers, and how large it is.

    Attributes:
        inputs: "pixels": float images (B, channels, *spatial); "ids": integer tokens (B, N).
        grid: the token grid; for pixels its sizes times `patch` are the image's.
        in_features: channels of the image, or size of the vocabulary.
        out_features: numbers answered per token.
        patch: side of the square patch one token stands for (pixels only).
        overlap: pixels a patch's embedding looks beyond its own border on each side (pixels only).
        before: tokens before its own that a token's embedding looks at too (ids only).
        dim, heads, depth, mlp_ratio: width, heads, blocks, and width of the MLP over `dim`.
        causal: whether a token may depend on earlier tokens only.
    """

    inputs: Literal["pixels", "ids"]
    grid: Grid
    in_features: int
    out_features: int
    patch: int = 1
    overlap: int = 0
    before: int = 0
    dim: int = 64
    heads: int = 4
    depth: int = 2
    mlp_ratio: float = 2.0
    causal: bool = False

    def __post_init__(self):
        if self.inputs not in ("pixels", "ids"):
            raise bad("inputs", self.inputs, "'pixels' or 'ids'")
        for name in ("in_features", "out_features", "patch", "dim", "heads", "depth"):
            if getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "a positive integer")
        if self.dim % self.heads:
            raise bad("dim", self.dim, f"a multiple of heads={self.heads}")
        if self.overlap < 0:
            raise bad("overlap", self.overlap, "zero or a positive integer")
        if self.inputs == "ids" and self.grid.ndim != 1:
            raise bad("grid", self.grid, "one axis for a sequence of ids")
        most = self.grid.numel - 1 if self.inputs == "ids" else 0
        if not 0 <= self.before <= most:
            raise bad("before", self.before, f"0 to {most} for these inputs")


def build_mixer(
    key: str,
    *,
    dim: int,
    grid: Grid,
    heads: int,
    causal: bool = False,
    layer: int | None = None,
    layers: int | None = None,
) -> nn.Module:
    """Build a registered mechanism for a workload, as a token mixer `forward(x (B, N, C), grid)`.

    `layer` and the number of `layers` are passed on to mechanisms that differ from layer to layer (shifted
    windows, alternating dilation, decay): those whose `for_workload` has options of these names.

    Raises:
        UnknownNameError: no such mechanism.
        ArgumentError, UnsupportedError: it cannot serve this grid, width or direction, for the reason said.
    """
    facts = get_system(key)
    make = getattr(facts.cls, "for_workload", None)
    if make is None:
        raise bad(
            "mechanism", key, "a mechanism with a `for_workload` constructor", f"Its role is {facts.role!r}."
        )
    known = signature(make).parameters
    where = {"layer": layer, "layers": layers}
    extra = {name: value for name, value in where.items() if value is not None and name in known}
    module = make(dim=dim, grid=grid, heads=heads, causal=causal, **extra)
    if facts.layout == "spatial":
        from foveate.mechanisms.layout import as_tokens

        module = as_tokens(module)
    return module


def sine_positions(grid: Grid, dim: int) -> Float[Tensor, "n dim"]:
    """Return sines and cosines of every token's coordinates, `dim` split evenly over the axes.

    Wave lengths run geometrically from 4 tokens to 4 axis lengths; left-over channels are zero.
    """
    coords = grid.coords().float()
    pairs = dim // (2 * grid.ndim)
    parts = []
    for axis, size in enumerate(grid.sizes):
        lengths = torch.logspace(math.log10(4.0), math.log10(4.0 * max(size, 2)), max(pairs, 1))[:pairs]
        angle = coords[:, axis : axis + 1] * (2 * math.pi / lengths)
        parts += [angle.sin(), angle.cos()]
    table = torch.zeros(grid.numel, dim)
    joined = torch.cat(parts, dim=1)
    table[:, : joined.shape[1]] = joined
    return table


class Block(nn.Module):
    """Pre-norm residual block: a mixer over tokens, then an MLP over channels."""

    def __init__(self, *, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm_mixer = nn.LayerNorm(dim)
        self.mixer: nn.Module = nn.Identity()
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix tokens, then channels."""
        x = x + self.mixer(self.norm_mixer(x), grid)
        return x + self.mlp(self.norm_mlp(x))


class Backbone(nn.Module):
    """The network of `NetSpec` around mixers made by `factory(dim=, grid=, heads=, causal=)`, one per block.

    Args:
        spec: what it reads and answers, and its size.
        factory: makes one token mixer; called once per block.
        seed: fixes all initial numbers; those outside the mixers do not depend on the factory.
    """

    def __init__(self, spec: NetSpec, factory: MixerFactory, *, seed: int = 0):
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if spec.inputs == "pixels":
                conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spec.grid.ndim - 1]
                self.embed: nn.Module = conv(
                    spec.in_features,
                    spec.dim,
                    spec.patch + 2 * spec.overlap,
                    stride=spec.patch,
                    padding=spec.overlap,
                )
            else:
                self.embed = nn.Embedding(spec.in_features, spec.dim)
                nn.init.normal_(self.embed.weight, std=0.5)
            self.position = nn.Parameter(sine_positions(spec.grid, spec.dim) * 0.5)
            self.blocks = nn.ModuleList(
                Block(dim=spec.dim, mlp_ratio=spec.mlp_ratio) for _ in range(spec.depth)
            )
            self.norm = nn.LayerNorm(spec.dim)
            self.head = nn.Linear(spec.dim, spec.out_features)
            # Drawn last, so that the rest does not depend on how many there are.
            earlier = [nn.Embedding(spec.in_features, spec.dim) for _ in range(spec.before)]
            for table in earlier:
                nn.init.normal_(table.weight, std=0.5)
            self.earlier = nn.ModuleList(earlier)
            for i, block in enumerate(self.blocks):
                # A seed of its own per layer: how many numbers one mixer draws must not move the next.
                torch.manual_seed(1_000_003 * (seed + 1) + i)
                block.mixer = factory(dim=spec.dim, grid=spec.grid, heads=spec.heads, causal=spec.causal)

    def forward(self, inputs: Tensor) -> Float[Tensor, "b n out"]:
        """Answer for every token.

        Args:
            inputs: (B, channels, *spatial) floats, or (B, N) ids, as `spec.inputs` says.
        """
        x = self.embed(inputs)
        if self.spec.inputs == "pixels":
            x = x.flatten(2).transpose(1, 2)
        for gap, table in enumerate(self.earlier, 1):
            x = x + pad(table(inputs[:, :-gap]), (0, 0, gap, 0))
        x = x + self.position
        for block in self.blocks:
            x = block(x, self.spec.grid)
        return self.head(self.norm(x))

    def _mixers(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.split(".")[2:3] == ["mixer"]]

    def parameter_counts(self) -> dict[str, int]:
        """Return the numbers of trained parameters: {"total", "mixers"}."""
        mixers = sum(p.numel() for p in self._mixers() if p.requires_grad)
        return {"total": sum(p.numel() for p in self.parameters() if p.requires_grad), "mixers": mixers}


def build(key: str, spec: NetSpec, *, seed: int = 0) -> Backbone:
    """Build the network of `spec` around the registered mechanism `key`; raises as `build_mixer` does."""
    layers = count()

    def factory(**where) -> nn.Module:
        return build_mixer(key, layer=next(layers), layers=spec.depth, **where)

    return Backbone(spec, factory, seed=seed)
