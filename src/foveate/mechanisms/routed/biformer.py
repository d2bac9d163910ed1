"""BiFormer: Vision Transformer with Bi-Level Routing Attention. arXiv 2303.08810, 2023.

The map is cut into S x S regions. Pooled queries of a region choose the k regions whose pooled keys fit best;
every token of the region then attends to all tokens of those regions. A depthwise convolution of the values
adds what is near.

    q, k, v = x W                                             (B, N, C) each
    idx = top_k(mean_region(q) mean_region(k)^T)              (B, S^2, k), no gradient
    out = softmax(q k[idx]^T / sqrt(C)) v[idx] + depthwise_conv(v)       per head; scaled by C, not C / H

Regions that do not divide the map are smaller at its border. The authors pad instead: with
`official="tokens"` the map is padded with zeros before the projection (so padding carries the bias and is
attended to), with `official="keys"` q, k and v are padded after it, in regions of floor(side / S) tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.routing.regions import Regions, select_regions, top_regions


@system(
    key="biformer",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arxiv="2303.08810",
    year=2023,
    family="routed",
    role="router",
    cost="O(N k N / S^2 C)",
    fidelity="vectors",
    dims=(2,),
    limits="The choice of regions gets no gradient, as published; keys are not pooled within regions.",
)
class BiLevelRoutingAttention(nn.Module):
    """Attention to the tokens of the k best regions.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        regions: S, regions per axis (an integer, or one per axis).
        topk: k, how many regions a region sees; -1 sees all.
        local_kernel: side of the depthwise convolution of the values (odd), 0 for none.
        qkv_bias: whether the q, k, v projections have a bias.
        official: None, "tokens" or "keys": how maps that the regions do not divide are padded (see above).
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        regions: int | Sequence[int] = 7,
        topk: int = 4,
        local_kernel: int = 5,
        qkv_bias: bool = True,
        official: Literal["tokens", "keys"] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if topk != -1 and topk < 1:
            raise bad("topk", topk, "a positive number of regions, or -1 for all")
        if local_kernel < 0 or (local_kernel and local_kernel % 2 == 0):
            raise bad("local_kernel", local_kernel, "an odd number, or 0 for none")
        if official not in (None, "tokens", "keys"):
            raise bad("official", official, "None, 'tokens' or 'keys'")
        self.dim, self.heads, self.topk, self.backend = dim, heads, topk, backend
        self.regions = regions if isinstance(regions, int) else tuple(regions)
        self.official = official
        self.scale = dim**-0.5
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.lepe = (
            nn.Conv2d(dim, dim, local_kernel, padding=local_kernel // 2, groups=dim) if local_kernel else None
        )
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "BiLevelRoutingAttention":
        """Return 7 or 8 regions per axis on large maps, fewer on small ones, and 4 of them for each.

        Raises:
            ArgumentError: naming `causal`, or `grid` when it is not 2-d.
        """
        refuse_causal(causal, "regions are pooled over their future tokens too")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Regions are boxes of a map.")
        # 7 as published where the map is large; a divisor of both sides where there is one.
        side = min(grid)
        wanted = [s for s in (7, 8, 4, 5, 6, 3, 2) if side >= 28 or s <= side // 2] or [1]
        count = next((s for s in wanted if all(n % s == 0 for n in grid)), wanted[0])
        return cls(dim=dim, heads=heads, regions=count, topk=min(4, count * count))

    def cut(self, grid: Grid) -> Regions:
        """Return the regions of a map."""
        if self.official != "keys":
            return Regions.of_count(grid, self.regions)
        counts = grid.per_axis(self.regions, "regions")
        return Regions(grid, tuple(max(n // c, 1) for n, c in zip(grid, counts, strict=True)))

    def route(
        self, q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], regions: Regions
    ) -> tuple[Float[Tensor, "b regions k"], Int[Tensor, "b regions k"]]:
        """Return the softmax over the chosen regions' logits, and their ids, best first. No gradient."""
        topk = regions.numel if self.topk == -1 else self.topk
        if topk > regions.numel:
            raise bad("topk", self.topk, f"at most the {regions.numel} regions of {regions.grid}")
        logits, chosen = top_regions(regions.pool(q.detach()) * self.scale, regions.pool(k.detach()), topk)
        return logits.softmax(-1), chosen

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x`, `grid`, or `topk` when there are fewer regions.
        """
        return self.forward_routed(x, grid)[0]

    def forward_routed(
        self, x: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b regions k"], Int[Tensor, "b regions k"]]:
        """Return the output, and what `route` chose."""
        check_tokens(x, grid, self.dim, (2,))
        inside = grid
        if self.official == "tokens":
            counts = grid.per_axis(self.regions, "regions")
            grid = Grid(*(c * math.ceil(n / c) for c, n in zip(counts, grid, strict=True)))
            x = _pad(x, inside, grid)
        regions = self.cut(grid)
        q, k, v = (merge_heads(part) for part in self.qkv(x))
        weights, chosen = self.route(q, k, regions)
        near = 0 if self.lepe is None else self._near(v, grid)
        if self.official == "keys":
            regions = regions.whole()
            q, k, v = (_pad(part, grid, regions.grid) for part in (q, k, v))
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        out = attend(q, k, v, where=select_regions(regions, chosen), scale=self.scale, backend=self.backend)
        out = self.proj(_crop(merge_heads(out), regions.grid, grid) + near)
        return _crop(out, grid, inside), weights, chosen

    def _near(self, v: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        assert self.lepe is not None
        return self.lepe(v.transpose(1, 2).unflatten(2, grid.sizes)).flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, regions={self.regions}, topk={self.topk}"


class BiFormerBlock(nn.Module):
    """Depthwise 3x3 convolution, routed attention and MLP, each with a residual.

    Args:
        dim, heads, regions, topk, local_kernel, backend: as in `BiLevelRoutingAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
        official: as in `BiLevelRoutingAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        regions: int | Sequence[int] = 7,
        topk: int = 4,
        local_kernel: int = 5,
        mlp_ratio: float = 3.0,
        official: Literal["tokens", "keys"] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BiLevelRoutingAttention(
            dim=dim,
            heads=heads,
            regions=regions,
            topk=topk,
            local_kernel=local_kernel,
            official=official,
            backend=backend,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        spatial = self.pos_embed(x.transpose(1, 2).unflatten(2, grid.sizes))
        x = x + spatial.flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


def _pad(x: Float[Tensor, "b n c"], grid: Grid, padded: Grid) -> Float[Tensor, "b m c"]:
    if padded == grid:
        return x
    below, right = padded[0] - grid[0], padded[1] - grid[1]
    return functional.pad(x.unflatten(1, grid.sizes), (0, 0, 0, right, 0, below)).flatten(1, 2)


def _crop(x: Float[Tensor, "b m c"], padded: Grid, grid: Grid) -> Float[Tensor, "b n c"]:
    if padded == grid:
        return x
    return x.unflatten(1, padded.sizes)[:, : grid[0], : grid[1]].flatten(1, 2)
