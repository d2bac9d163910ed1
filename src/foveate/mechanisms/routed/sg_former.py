"""SG-Former: Self-guided Transformer with Evolving Token Reallocation. arXiv 2308.12216, 2023.

Two layers take turns. In the hybrid layer half of the heads look at the whole map through keys reduced by a
strided convolution, and half look at every token of their window; on the way it is noted how much attention
each token receives. The guided layer sorts the tokens by that significance and merges consecutive ones into
keys, many into one where significance is low and few where it is high.

    o1 = softmax(q1 k1^T / sqrt(D)) v1,   k1, v1 from GELU(LN(conv_{r x r}(x)))        H/2 heads, N / r^2 keys
    o2 = softmax(q2 k2^T / sqrt(D)) v2,   inside windows of 7 x 7                      H/2 heads
    s = upsample(mean_{heads, queries} a1) + mean_{heads, queries of the window} a2    (B, N), no gradient
    guided: k, v from merge(x sorted by s), rates from the lowest quarter of s to the highest
    out = (o + depthwise_conv3x3(x W)) W_o                                             in both layers

The means over queries are sums of columns of softmax maps that are never formed: a second pass with queries
and keys exchanged (`collect`). Half of the guided heads sort the tokens in column-major order, which differs
for ties only, unless each half is given a significance of its own.

`SelfGuidedAttention`, the pair with a residual in between, is what is registered. The authors' layers need
maps of multiples of 7 and of the merging rates; here border windows are smaller, the map is padded with zeros
for the convolution, and a smaller last group is merged by the first of its weights.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.collect import collect
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Windows
from foveate.routing.significance import SignificanceMerge

# Tokens merged into one by the guided layers beside a reduction, as published.
RATES = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}


def _even_heads(dim: int, heads: int) -> None:
    check_heads(dim, heads)
    if heads % 2:
        raise bad("heads", heads, "an even number", "Half of the heads do one thing, half another.")


def _map(x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b c h w"]:
    return x.transpose(1, 2).unflatten(2, grid.sizes)


class LocalEnhancement(nn.Module):
    """Depthwise 3x3 convolution of a linear map of the tokens: what all layers add before their projection."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply both to the tokens of a 2-d grid."""
        return self.conv(_map(self.linear(x), grid)).flatten(2).transpose(1, 2)


class HybridScaleAttention(nn.Module):
    """Half of the heads attend to a reduced map, half inside windows; tells what is significant.

    Args:
        dim: channels C.
        heads: number of heads, even; must divide `dim`.
        reduction: stride and side of the convolution that makes the reduced map.
        window: side of a window; smaller maps are one window.
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
        reduction: int = 8,
        window: int = 7,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        _even_heads(dim, heads)
        for name, value in (("reduction", reduction), ("window", window)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        self.dim, self.heads, self.reduction, self.window = dim, heads, reduction, window
        self.backend = backend
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = nn.LayerNorm(dim)
        self.q1 = nn.Linear(dim, dim // 2, bias=qkv_bias)
        self.kv1 = nn.Linear(dim, dim, bias=qkv_bias)
        self.q2 = nn.Linear(dim, dim // 2, bias=qkv_bias)
        self.kv2 = nn.Linear(dim, dim, bias=qkv_bias)
        self.lepe = LocalEnhancement(dim)
        self.proj = nn.Linear(dim, dim)

    def windows(self, grid: Grid) -> Windows:
        """Return the windows of a map."""
        return Windows(grid, tuple(min(self.window, length) for length in grid))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a 2-d `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        return self._mix(x, grid, significant=False)[0]

    def forward_significant(
        self, x: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Return the output, and how significant each token is (row-major, no gradient)."""
        out, significance = self._mix(x, grid, significant=True)
        assert significance is not None
        return out, significance

    def _mix(self, x: Tensor, grid: Grid, *, significant: bool) -> tuple[Tensor, Tensor | None]:
        check_tokens(x, grid, self.dim, (2,))
        half, r = self.heads // 2, self.reduction
        beside = [side for length in reversed(grid.sizes) for side in (0, -length % r)]
        reduced = self.sr(functional.pad(_map(x, grid), beside))
        cells = Grid(*reduced.shape[2:])
        reduced = functional.gelu(self.norm(reduced.flatten(2).transpose(1, 2)))
        far = [split_heads(part, half) for part in (self.q1(x), *self.kv1(reduced).chunk(2, dim=-1))]
        near = [split_heads(part, half) for part in (self.q2(x), *self.kv2(x).chunk(2, dim=-1))]
        where = self.windows(grid)
        if not significant:
            o1, o2 = (attend(*far, backend=self.backend), attend(*near, where=where, backend=self.backend))
            significance = None
        else:
            o1, lse1 = attend(*far, return_lse=True, backend=self.backend)
            o2, lse2 = attend(*near, where=where, return_lse=True, backend=self.backend)
            significance = self._upsampled(self._received(far, lse1, None) / grid.numel, cells, grid)
            queries = torch.ones(1, device=x.device)
            for axis, length in zip(where.local, grid, strict=True):
                queries = (queries[:, None] * axis.rule(length, length).count.to(x.device)).flatten()
            significance = significance + self._received(near, lse2, where) / queries.to(x.dtype)
        mixed = merge_heads(torch.cat([o1, o2], dim=1))
        return self.proj(mixed + self.lepe(x, grid)), significance

    @torch.no_grad()
    def _received(self, parts: list[Tensor], lse: Tensor, where: Windows | None) -> Float[Tensor, "b n_k"]:
        """Return the attention each key receives from all queries, averaged over heads."""
        q, k = parts[0].detach(), parts[1].detach()
        # Windows see one another alike, so that the pattern is its own transpose.
        sums = collect(q, k, torch.ones_like(q[..., :1]), lse.detach(), where=where, backend=self.backend)
        return sums[..., 0].mean(1)

    def _upsampled(self, x: Float[Tensor, "b cells"], cells: Grid, grid: Grid) -> Float[Tensor, "b n"]:
        spread = x.unflatten(1, cells.sizes)
        for axis in (1, 2):
            spread = spread.repeat_interleave(self.reduction, dim=axis)
        return spread[:, : grid[0], : grid[1]].flatten(1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, reduction={self.reduction}, window={self.window}"


class GuidedAttention(nn.Module):
    """Attention to tokens merged by significance.

    Args:
        dim: channels C.
        heads: number of heads, even; must divide `dim`.
        rates: tokens merged into one, from the least to the most significant level (see `SignificanceMerge`).
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
        rates: Sequence[int] = RATES[8],
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        _even_heads(dim, heads)
        self.dim, self.heads, self.backend = dim, heads, backend
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv1 = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv2 = nn.Linear(dim, dim, bias=qkv_bias)
        self.merge = SignificanceMerge(rates)
        self.lepe = LocalEnhancement(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        significance: Float[Tensor, "b n"] | Float[Tensor, "b 2 n"],
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a 2-d `grid`.

        Args:
            x: tokens.
            grid: their geometry.
            significance: of every token, row-major; or one for each half of the heads.

        Raises:
            ArgumentError: naming `x`, `grid` or `significance`.
        """
        check_tokens(x, grid, self.dim, (2,))
        batch, n = x.shape[:2]
        if tuple(significance.shape) not in ((batch, n), (batch, 2, n)):
            raise bad("significance", tuple(significance.shape), "(B, N), or (B, 2, N), as x has tokens")
        rows, columns = (significance, significance) if significance.ndim == 2 else significance.unbind(1)
        # Column-major, as the authors flatten their second map: other neighbours stay together among ties.
        turned = torch.arange(grid.numel, device=x.device).unflatten(0, grid.sizes).T.flatten()
        first = self.kv1(self.merge(x, rows)).chunk(2, dim=-1)
        second = self.kv2(self.merge(x[:, turned], columns[:, turned])).chunk(2, dim=-1)
        half = self.heads // 2
        k, v = (
            torch.cat([split_heads(part, half) for part in pair], dim=1)
            for pair in zip(first, second, strict=True)
        )
        out = attend(split_heads(self.q(x), self.heads), k, v, backend=self.backend)
        return self.proj(merge_heads(out) + self.lepe(x, grid))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}"


class EnhancedAttention(nn.Module):
    """Full attention with the local enhancement: the layer of the last stage.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.
    """

    def __init__(self, *, dim: int, heads: int, qkv_bias: bool = True, backend: str = "auto"):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.backend = dim, heads, backend
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = LocalEnhancement(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a 2-d `grid`."""
        check_tokens(x, grid, self.dim, (2,))
        q, k, v = (split_heads(part, self.heads) for part in (self.q(x), *self.kv(x).chunk(2, dim=-1)))
        return self.proj(merge_heads(attend(q, k, v, backend=self.backend)) + self.lepe(x, grid))


@system(
    key="sg_former",
    title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
    arxiv="2308.12216",
    year=2023,
    family="routed",
    role="router",
    cost="O(N (N / r^2 + 49 + M) C), M merged tokens",
    fidelity="vectors",
    dims=(2,),
    limits="Significance gets no gradient; ties in it are merged in the order of the map. Heads are even.",
)
class SelfGuidedAttention(nn.Module):
    """A hybrid layer and the layer it guides: h + guided(x + h), h = hybrid(x).

    With x added outside, as blocks do, these are two layers with residuals.

    Args:
        dim: channels C.
        heads: number of heads, even; must divide `dim`.
        reduction: of the hybrid layer; 8, 4 or 2 with their published merging rates.
        window: side of the hybrid layer's windows.
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
        reduction: int = 8,
        window: int = 7,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if reduction not in RATES:
            hint = "Build HybridScaleAttention and GuidedAttention with rates of your own."
            raise bad("reduction", reduction, "8, 4 or 2", hint)
        self.dim, self.heads, self.reduction = dim, heads, reduction
        self.hybrid = HybridScaleAttention(
            dim=dim, heads=heads, reduction=reduction, window=window, qkv_bias=qkv_bias, backend=backend
        )
        self.guided = GuidedAttention(
            dim=dim, heads=heads, rates=RATES[reduction], qkv_bias=qkv_bias, backend=backend
        )

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "SelfGuidedAttention":
        """Return the published reduction for the size of the map: 8 from 48 tokens a side, 4 from 24, else 2.

        An odd number of heads is doubled where `dim` allows it, since the layer has two halves.

        Raises:
            ArgumentError: naming `causal`, `heads` when it is odd, or `grid` when it is not 2-d.
        """
        refuse_causal(causal, "keys are merged from later tokens too")
        if check_heads(dim, heads) % 2 == 0 and heads % 2:
            heads = 2 * heads
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "The reduced map comes from a 2-d convolution.")
        side = min(grid)
        return cls(dim=dim, heads=heads, reduction=8 if side >= 48 else 4 if side >= 24 else 2)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a 2-d `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        h, significance = self.hybrid.forward_significant(x, grid)
        return h + self.guided(x + h, grid, significance)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, reduction={self.reduction}"
