"""Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost.
arXiv 2312.08614, 2023.

The attention matrix is replaced by a few narrow ones. Channels are split into groups; in each, every token
attends to a small set of tokens that stand for the whole map. The global group pools the map with a strided
convolution. A local group lays windows of M x M over the map and averages what stands at the same place of
all windows, so that M^2 tokens remain; in the second local group the windows are dilated by r.

    q = x W_q;  x = [x_0 | x_1 | x_2],  q = [q_0 | q_1 | q_2]      C in parts of 2 : 7 : 7 (1 : 7 when r = 1)
    k_0, v_0 = norm(conv_r(x_0)) W_0                                (B, 1, N / r^2, C_0), one head
    y_i = pointwise(depthwise3x3(x))_i;  a_i = mean_w y_i[window w]      (B, H, M^2, C_i / H)
    k_i, v_i = (a_i U_i) W_i                                        the same maps for every head
    out_i = softmax(q_i k_i^T / sqrt(D_i)) (v_i + depthwise3x3(v_i));   out = [out_0 | out_1 | out_2] W

Windows stand one span, d (M - 1) + 1 tokens, apart (d = 1 or r), and the map is reflected beyond its lower
and right border until they fit: each side needs at least span / 2 tokens, rounded up. The convolution leaves
out rows and columns that r does not divide.

The authors' code does not average over windows channel by channel: it averages runs of as many neighbours in
the flattened (window, channel) order, which mixes channels wherever there is more than one window. That is
`official=True`; the default is the mean over windows that the paper describes.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.patches import Patches


class WindowMean(nn.Module):
    """A local group: M^2 keys and values, each the mean over all windows of one place in them.

    Args:
        dim: channels of the group.
        heads: number of heads; must divide `dim`.
        window: M, the side of a window.
        dilation: distance of neighbouring tokens of a window.
        bias: whether the linear maps have one.
        official: average as the authors' code does (see the top of this file).
    """

    def __init__(self, *, dim: int, heads: int, window: int, dilation: int, bias: bool, official: bool):
        super().__init__()
        width = check_heads(dim, heads)
        self.dim, self.heads, self.window, self.dilation = dim, heads, window, dilation
        self.official = official
        self.fc = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.local = depthwise(dim)

    def windows(self, grid: Grid) -> Patches:
        """Return the windows on `grid`, reflected beyond its far borders."""
        span = self.dilation * (self.window - 1) + 1
        counts = tuple(math.ceil(n / span) for n in grid)
        return Patches(
            grid, self.window, stride=span, counts=counts, dilation=self.dilation, border="reflect"
        )

    def gather(self, y: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h m d"]:
        """Return the means over the windows, per head."""
        boxes = y[:, self.windows(grid).tokens.to(y.device)].unflatten(-1, (self.heads, -1))
        boxes = boxes.permute(0, 3, 2, 1, 4)  # (b, h, m, windows, d)
        if self.official:
            windows, width = boxes.shape[3:]
            return boxes.flatten(3).unflatten(3, (width, windows)).mean(-1)
        return boxes.mean(3)

    def forward(
        self, y: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Return keys and values."""
        k, v = self.kv(self.fc(self.gather(y, grid))).chunk(2, dim=-1)
        return k, v + split_heads(
            on_map(self.local, merge_heads(v), Grid(self.window, self.window)), self.heads
        )


@system(
    key="favit",
    title="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
    arxiv="2312.08614",
    year=2023,
    family="local",
    role="module",
    cost="O(N (N / r^2 C_0 + M^2 C))",
    fidelity="vectors",
    dims=(2,),
    sizes="sides of at least half a window's span, reduction (window - 1) + 1",
    limits="Local groups see means over all windows of the map, never single tokens.",
)
class FactorizedAttention(nn.Module):
    """Factorised self-attention (FaSA): a pooled global group and one or two groups of averaged windows.

    Args:
        dim: channels C; a multiple of 8, or of 16 with `reduction` > 1.
        heads: heads of each local group; must divide its channels, 7/8 or 7/16 of `dim`.
        reduction: r, stride of the global group's convolution and dilation of the second local group; with 1
            there is no second local group.
        window: M, side of the windows.
        qkv_bias: whether the maps to queries, keys and values have a bias.
        official: average windows as the authors' code does (see the top of this file).
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads`, `reduction` or `window`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        reduction: int = 1,
        window: int = 7,
        qkv_bias: bool = True,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        for name, value in (("reduction", reduction), ("window", window)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        shares = (2, 7, 7) if reduction > 1 else (1, 7)
        if dim % sum(shares):
            hint = f"Channels are divided {' : '.join(map(str, shares))}."
            raise bad("dim", dim, f"a multiple of {sum(shares)} with reduction={reduction}", hint)
        self.parts = tuple(dim // sum(shares) * share for share in shares)
        if self.parts[1] % heads:
            raise bad("heads", heads, f"a divisor of the {self.parts[1]} channels of a local group")
        self.dim, self.heads, self.reduction, self.window = dim, heads, reduction, window
        self.official, self.backend = official, backend
        wide, narrow = self.parts[0], dim - self.parts[0]
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.reduce = nn.Conv2d(wide, wide, reduction, stride=reduction)
        self.norm = nn.LayerNorm(wide)
        self.kv = nn.Linear(wide, 2 * wide, bias=qkv_bias)
        self.local = depthwise(wide)
        self.mix = nn.Sequential(depthwise(narrow), nn.Conv2d(narrow, narrow, 1))
        self.groups = nn.ModuleList(
            WindowMean(
                dim=part, heads=heads, window=window, dilation=dilation, bias=qkv_bias, official=official
            )
            for part, dilation in zip(self.parts[1:], (1, reduction), strict=False)
        )
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "FactorizedAttention":
        """Return the published windows, 7 x 7, and a reduction of 8, 4, 2 or 1 that leaves 7 rows or more.

        The reduction is 1 where the channels cannot be divided 2 : 7 : 7.

        Raises:
            ArgumentError: naming `causal`, `dim`, or `grid` when it is not 2-d or too small.
        """
        refuse_causal(causal, "windows are averaged over the whole map")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "The convolutions are published for images.")
        check_heads(dim, heads)
        divides = dim % 16 == 0 and dim * 7 // 16 % heads == 0
        fits = [r for r in (8, 4, 2) if divides and min(grid) >= 7 * r]
        return cls(dim=dim, heads=heads, reduction=max(fits, default=1))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x`, or `grid` when it is too small to be reflected or reduced.
        """
        check_tokens(x, grid, self.dim, (2,))
        if min(grid) < self.reduction:
            raise bad("grid", grid, f"sides of at least reduction={self.reduction}")
        wide = self.parts[0]
        q = self.q(x)
        k, v = self._pooled(x[..., :wide], grid)
        outs = [attend(split_heads(q[..., :wide], 1), k, v, backend=self.backend)]
        y = on_map(self.mix, x[..., wide:], grid)
        # Heads divide the channels of both local groups together; each group takes its part of every head.
        widths = [part // self.heads for part in self.parts[1:]]
        queries = split_heads(q[..., wide:], self.heads).split(widths, dim=-1)
        for group, q_i, y_i in zip(self.groups, queries, y.split(self.parts[1:], dim=-1), strict=True):
            outs.append(attend(q_i, *group(y_i, grid), backend=self.backend))
        return self.proj(torch.cat([merge_heads(out) for out in outs], dim=-1))

    def _pooled(
        self, x: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b 1 m c"], Float[Tensor, "b 1 m c"]]:
        """Return keys and values of the global group, from the map reduced by the convolution."""
        small = Grid(*(n // self.reduction for n in grid))
        k, v = self.kv(self.norm(on_map(self.reduce, x, grid))).chunk(2, dim=-1)
        return split_heads(k, 1), split_heads(v + on_map(self.local, v, small), 1)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, reduction={self.reduction}, window={self.window}, "
            f"official={self.official}"
        )


def depthwise(dim: int) -> nn.Conv2d:
    """Return a depthwise 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def on_map(layer: nn.Module, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m d"]:
    """Apply a layer for maps to tokens."""
    return layer(x.transpose(1, 2).unflatten(2, grid.sizes)).flatten(2).transpose(1, 2)
