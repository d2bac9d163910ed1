"""Long-Range Grouping Transformer for Multi-View 3D Reconstruction. arXiv 2308.08724, 2023.

Tokens of all views of an object are dealt into groups by a stride: a group holds, from every view, the tokens at one
phase of an s x s pattern, so that it is a coarse picture of everything. Attention runs inside groups, and a depthwise
convolution of the values adds each view's own signature. Before the decoder, density-peak clustering merges the
tokens of all views to a few, which then attend to all of them.

    q, k, v = x W                                             (B, H, V h w, d): V views of h x w tokens
    out_i = softmax_{j : j = i mod s on both map axes}(q_i . k_j / sqrt(d)) v_j + (depthwise 3 x 3)(v)_i
    then W_o;  s^2 groups of V h w / s^2 tokens

    merging:  z = LN(x), c = peaks(z), a = Linear(z)
    m_r = sum_{i in r} exp(a_i) z_i / (sum_{i in r} exp(a_i) + 1e-6)                              (B, M, C)
    y = m + softmax(m W_q (z W_k)^T / sqrt(d) + a) z W_v W_o;   y + MLP(LN(y))

A grid with two axes is one view. The authors' map is 14 x 14; here sizes are free, and groups differ by a row or a
column where the stride does not divide them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.patterns.offsets import Offsets
from foveate.patterns.pattern import Pattern, check_int
from foveate.patterns.strided import Strided
from foveate.routing.peaks import density_peaks, merge_clusters
from foveate.scores.bias import KeyBias


def over_views(grid: Grid) -> Grid:
    """Return the grid as (views, height, width)."""
    return grid if grid.ndim == 3 else Grid(1, *grid)


@system(
    key="long_range_grouping",
    title="Long-Range Grouping Transformer for Multi-View 3D Reconstruction",
    arxiv="2308.08724",
    year=2023,
    family="routed",
    role="pattern",
    cost="O(N^2 / s^2 C), N tokens of all views",
    fidelity="vectors",
    dims=(2, 3),
    limits="The voxel decoder is not part of it.",
)
class LongRangeGrouping(nn.Module):
    """Attention inside strided groups over all views.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        group: s, distance between neighbouring tokens of a group on the map; s^2 groups.
        grouped: False is plain attention inside each view, without the signature: the authors' other layers.
        signature: whether a depthwise 3 x 3 convolution of the values is added to grouped attention.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        group: int = 7,
        grouped: bool = True,
        signature: bool = True,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        self.dim, self.heads, self.group = dim, heads, check_int(group, "group", 1)
        self.grouped, self.backend = grouped, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.signature = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if grouped and signature else None
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "LongRangeGrouping":
        """Return a stride that takes about four tokens per map axis, two as published where views are many.

        Raises:
            ArgumentError: naming `causal`, or `grid` when it has one axis.
        """
        refuse_causal(causal, "a group holds tokens from everywhere")
        if grid.ndim == 1:
            raise bad("grid", grid, "a map (2 axes) or views of a map (3 axes)")
        views, *sizes = over_views(grid)
        return cls(dim=dim, heads=heads, group=max(1, min(sizes) // (4 if views < 4 else 2)))

    def where(self, grid: Grid) -> Pattern:
        """Return who sees whom on `grid`."""
        views = over_views(grid)
        if self.grouped:
            return Strided(views, (1, self.group, self.group))
        return Offsets(views, ((0, 0), (None, None), (None, None)))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a map (2 axes) or of several views of it (3 axes, views first).

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2, 3))
        q, k, v = self.qkv(x)
        out = merge_heads(attend(q, k, v, where=self.where(grid), backend=self.backend))
        if self.signature is not None:
            maps = merge_heads(v).unflatten(1, over_views(grid).sizes).flatten(0, 1).movedim(-1, 1)
            own = self.signature(maps).movedim(1, -1)
            out = out + own.reshape(out.shape)
        return self.proj(out)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, group={self.group}, grouped={self.grouped}"


def _mlp(dim: int, ratio: float) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class LongRangeBlock(nn.Module):
    """Grouped attention and MLP, each after a LayerNorm and with a residual.

    Args:
        dim, heads, group, grouped, qkv_bias, backend: as in `LongRangeGrouping`.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        group: int = 7,
        grouped: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = LongRangeGrouping(
            dim=dim, heads=heads, group=group, grouped=grouped, qkv_bias=qkv_bias, backend=backend
        )
        self.mlp = _mlp(dim, mlp_ratio)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class Merged(NamedTuple):
    """What `SimilarTokenMerger` returns: the merged tokens (B, M, C), and the cluster of every token (B, N)."""

    out: Tensor
    labels: Tensor


class SimilarTokenMerger(nn.Module):
    """Merge the tokens of all views to a few, which then attend to all of them.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        tokens: M, how many are left.
        neighbours: k of the density (see `density_peaks`).
        mlp_ratio: hidden width of the MLP over `dim`.
        qkv_bias: whether the q, k, v projections have a bias.
        official: equally dense tokens may both become centres, unless noise tells them apart.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        tokens: int,
        neighbours: int = 15,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.backend, self.official = dim, heads, backend, official
        self.tokens, self.neighbours = check_int(tokens, "tokens", 1), check_int(neighbours, "neighbours", 1)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.mlp = _mlp(dim, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        noise: Float[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Merged:
        """Merge the tokens.

        Args:
            x: tokens of all views.
            noise: added to the densities.
            generator: draws that noise instead, as published. With neither, ties go to the earlier token.

        Raises:
            ArgumentError: naming `x`, or `count` or `neighbours` when there are fewer tokens.
        """
        check_tokens(x, Grid(x.shape[1]), self.dim)
        z = self.norm1(x)
        labels: Int[Tensor, "b n"] = density_peaks(
            z,
            self.tokens,
            neighbours=self.neighbours,
            noise=noise,
            generator=generator,
            ties=not self.official,
        ).labels
        score = self.score(z).squeeze(-1)
        merged = merge_clusters(z, labels, self.tokens, score=score)
        q, k, v = (split_heads(m(y), self.heads) for m, y in ((self.q, merged), (self.k, z), (self.v, z)))
        out = attend(q, k, v, score=KeyBias(score[:, None]), backend=self.backend)
        out = merged + self.proj(merge_heads(out))
        return Merged(out + self.mlp(self.norm2(out)), labels)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, tokens={self.tokens}, neighbours={self.neighbours}"
