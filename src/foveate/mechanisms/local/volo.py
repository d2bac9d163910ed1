"""VOLO: Vision Outlooker for Visual Recognition. arXiv 2106.13112, 2021.

No queries and keys are compared. From the features of an anchor (a token, or the mean of a few) one linear
map writes down all the weights with which the K x K tokens around it mix their values among themselves. Every
token stands in several such windows and gets the sum of what they make of it. With H heads of width D:

    v = x W_v                                                                (B, H, N, D)
    A_a = softmax_rows(anchor_a W_a / sqrt(D))                               (B, H, anchors, K^2, K^2)
    out_i = sum_{a: i in window(a)} sum_{j in window(a)} A_a[i, j] v_j       then a projection

Anchors stand `stride` apart; with stride > 1 an anchor is the mean of stride x stride tokens. Windows that
leave the map find zeros there, which take part in the softmax and give nothing, and what is written there is
lost. The sums are not divided by the number of windows (up to K^2 at stride 1).
"""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import apply
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.patches import Patches
from foveate.routing.regions import Regions


@system(
    key="volo",
    title="VOLO: Vision Outlooker for Visual Recognition",
    arxiv="2106.13112",
    year=2021,
    family="local",
    role="module",
    cost="O(N C (C + H K^4 / stride^2))",
    fidelity="vectors",
    primitive="apply",
    limits="Weights depend on the anchor alone, not on whom it meets; parameters grow as K^(2 axes).",
)
class OutlookAttention(nn.Module):
    """Mix every window by weights that its anchor writes down.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: K, one integer per axis of the grids it will see (an integer: a square).
        stride: distance of the anchors, per axis.
        padding: tokens that the first window reaches beyond the border, per axis; window // 2 when None.
        qkv_bias: whether the projection to values has a bias.
        scale: of the written weights before the softmax; 1 / sqrt(head width) when None.

    Raises:
        ArgumentError: naming `window`, `stride` or `padding`, when windows would leave tokens out.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        width = check_heads(dim, heads)
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in self.window):
            raise bad("window", window, "a positive integer, or one per axis")
        box = Grid(*self.window)
        self.stride = box.per_axis(stride, "stride")
        halves = tuple(w // 2 for w in self.window)
        self.padding = halves if padding is None else box.per_axis(padding, "padding")
        for w, s, p in zip(self.window, self.stride, self.padding, strict=True):
            if not 1 <= s <= w:
                raise bad("stride", stride, f"between 1 and the window, {w}", "Tokens would be left out.")
            if not 0 <= p <= w - s:
                raise bad("padding", padding, f"between 0 and window - stride = {w - s}, not {p}")
        self.dim, self.heads = dim, heads
        self.scale = width**-0.5 if scale is None else scale
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.weights = nn.Linear(dim, heads * box.numel**2)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "OutlookAttention":
        """Return the published windows: 3 per axis with anchors 2 apart.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "windows look both ways")
        return cls(dim=dim, heads=heads, window=(3,) * grid.ndim, stride=2)

    def where(self, grid: Grid) -> Patches:
        """Return the windows on `grid`; what lies beyond the border is absent from them."""
        return Patches(
            grid,
            self.window,
            stride=self.stride,
            counts=tuple(math.ceil(n / s) for n, s in zip(grid, self.stride, strict=True)),
            start=tuple(-p for p in self.padding),
        )

    def outlook(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h anchors m m"]:
        """Return the weights that each anchor writes: rows are the tokens of its window that receive."""
        anchors = x if max(self.stride) == 1 else Regions(grid, self.stride).pool(x)
        box = math.prod(self.window)
        written = self.weights(anchors).unflatten(2, (self.heads, box, box)).transpose(1, 2)
        return (written * self.scale).softmax(-1)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.window),))
        v = split_heads(self.v(x), self.heads)
        out = apply(self.outlook(x, grid), v, self.where(grid).schedule("sum"))
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, stride={self.stride}"


class Outlooker(nn.Module):
    """The block around `OutlookAttention`: pre-norm, GELU MLP, residuals.

    Args:
        dim, heads, window, stride, padding, qkv_bias, scale: as in `OutlookAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = OutlookAttention(
            dim=dim,
            heads=heads,
            window=window,
            stride=stride,
            padding=padding,
            qkv_bias=qkv_bias,
            scale=scale,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))
