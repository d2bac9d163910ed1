"""Breaking the Low-Rank Dilemma of Linear Attention. arXiv 2411.07635, 2024.

Linear attention sums all keys and values into one D x D matrix, and its outputs come out of low rank: features
are positive, so most pairs look alike. The paper acts on both sides. Keys are weighted by how much the mean query
attends to them, N of weight in all, before they enter the sum; and the result is multiplied, channel by channel,
with a linear map of the tokens themselves, which raises the rank whatever the sum was. Rotary positions on both
map axes turn queries and keys in the numerator only, so that the divisor stays positive.

    q, k, v, o = x W                                           (B, H, N, D) each; o stays a map (B, C, Y, X)
    q, k = elu(q) + 1, elu(k) + 1
    a = softmax_n(mean(q) . k_n / sqrt(D))                     (B, H, N), k_n <- N a_n k_n
    y_n = rope(q_n) sum_m rope(k_m) v_m^T / (q_n . sum_m k_m + N 1e-6)
    out = W_out ((y + dwconv5x5(v)) * o)                       (B, C, Y, X)

The weights of one row would sum to one without the turns. In the later stages of the published network softmax
attention over turned queries and keys takes the place of y, all else equal (`form="softmax"`). Rotary angles: the
first half of a head turns with the row, the second with the column, D / 4 frequencies from 1 to 1 / 10000, both
included, on neighbouring channels.

Numerator and divisor have different keys, so they are two scans over all tokens.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.scan.api import scan
from foveate.mechanisms.inputs import check_heads, check_spatial, refuse_causal
from foveate.mechanisms.norms import MapNorm
from foveate.mechanisms.positions import Turns, map_turns, turned

EPS = 1e-6  # added to the mean weight of a row


def rank_augmented(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    *,
    turns: Turns | None = None,
    augment: bool = True,
) -> Float[Tensor, "b h n e"]:
    """Return y of the module docstring, computed in float32 (float64 for float64).

    Args:
        q, k: before the feature map.
        v: values.
        turns: cosines and sines of the rotary positions, one per channel pair; None for no turn.
        augment: whether keys are weighted by the mean query; without it every key counts 1.
    """
    dtype, n = q.dtype, q.shape[2]
    wide = accumulation_dtype(dtype)
    q, k, v = elu(q.to(wide)) + 1, elu(k.to(wide)) + 1, v.to(wide)
    if augment:
        k = k * key_weights(q, k).unsqueeze(-1)
    total = scan(turned(q, turns), turned(k, turns), v, causal=False, scale=1 / n)
    weight = scan(q, k, torch.ones_like(v[..., :1]), causal=False, scale=1 / n)
    return (total / (weight + EPS)).to(dtype)


def key_weights(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
    """Return how much each key counts: N times its share in the attention of the mean query (features given)."""
    logits = (q.mean(2, keepdim=True) @ k.mT).squeeze(2) * k.shape[-1] ** -0.5
    return logits.softmax(-1) * k.shape[2]


@system(
    key="rala",
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    arxiv="2411.07635",
    year=2024,
    family="linear",
    role="linear-kernel + gate",
    cost="O(N C^2 / H)",
    layout="spatial",
    fidelity="vectors",
    primitive="scan",
    dims=(2,),
    limits="Images only; heads are a multiple of 4 wide.",
)
class RALA(nn.Module):
    """Rank-augmented linear attention over a map, or the softmax attention that stands in its place.

    Args:
        dim: channels C.
        heads: number of heads H; their width must be a multiple of 4.
        form: "linear", or "softmax" for the published network's later stages.
        augment: whether keys are weighted by the mean query, in the linear form.
        rotary: whether queries and keys are turned by their positions.
        kernel: side of the depthwise convolution of the values; odd.
        backend: of `attend`, in the softmax form.

    Raises:
        ArgumentError: naming `dim`, `heads`, `form` or `kernel`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        form: Literal["linear", "softmax"] = "linear",
        augment: bool = True,
        rotary: bool = True,
        kernel: int = 5,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        if rotary and width % 4:
            raise bad("heads", heads, f"heads a multiple of 4 wide, not {width}", "Or leave out rotary.")
        if form not in ("linear", "softmax"):
            raise bad("form", form, "'linear' or 'softmax'")
        if kernel < 1 or kernel % 2 == 0:
            raise bad("kernel", kernel, "a positive odd number")
        self.dim, self.heads, self.width, self.form = dim, heads, width, form
        self.augment, self.rotary, self.kernel, self.backend = augment, rotary, kernel, backend
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        for conv in (self.qkvo, self.lepe, self.proj):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "RALA":
        """Return the linear form; it takes every map.

        Raises:
            ArgumentError: naming `grid`, `heads` or `causal`.
        """
        refuse_causal(causal, "keys are weighted by the mean of all queries")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Values pass a convolution over a map.")
        return cls(dim=dim, heads=heads)

    def turns(self, grid: Grid, like: Tensor) -> Turns | None:
        """Return cosines and sines of what the channel pairs of a head turn by, None without rotary positions."""
        return map_turns(grid, self.width, like) if self.rotary else None

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Mix the pixels of `x`, any height and width.

        Raises:
            ArgumentError: naming `x`.
        """
        check_spatial(x, self.dim)
        *_, values, gate = parts = self.qkvo(x).chunk(4, dim=1)
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)).mT for part in parts[:3])
        turns = self.turns(Grid(*x.shape[2:]), x)
        if self.form == "linear":
            out = rank_augmented(q, k, v, turns=turns, augment=self.augment)
        else:
            out = attend(turned(q, turns), turned(k, turns), v, backend=self.backend)
        out = out.mT.flatten(1, 2).unflatten(2, x.shape[2:])
        return self.proj((out + self.lepe(values)) * gate)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, form={self.form!r}, augment={self.augment}"


class ConvFFN(nn.Module):
    """The published feed-forward part: 1 x 1, GELU, plus a depthwise 3 x 3 of itself, 1 x 1.

    Args:
        dim: channels C.
        hidden: channels between.
    """

    def __init__(self, *, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Map every pixel, with a look at its neighbours."""
        x = nn.functional.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class RALABlock(nn.Module):
    """The published block: convolutional positions, attention, feed-forward; each with a residual.

        x += dwconv3x3(x);  x += gamma1 attn(LN(x));  x += gamma2 ffn(LN(x))      (B, C, Y, X)

    Args:
        dim: channels C.
        heads: number of heads.
        form: of the attention.
        hidden: channels inside the feed-forward part.
        layer_scale: initial value of gamma1 and gamma2; None for none.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        form: Literal["linear", "softmax"] = "linear",
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = MapNorm(dim, eps=1e-6), MapNorm(dim, eps=1e-6)
        self.attn = RALA(dim=dim, heads=heads, form=form)
        self.ffn = ConvFFN(dim=dim, hidden=hidden)
        scale = None if layer_scale is None else torch.full((1, dim, 1, 1), float(layer_scale))
        self.gamma_1 = None if scale is None else nn.Parameter(scale)
        self.gamma_2 = None if scale is None else nn.Parameter(scale.clone())

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Apply the block to a map of any height and width."""
        x = x + self.pos(x)
        x = x + _scaled(self.attn(self.norm1(x)), self.gamma_1)
        return x + _scaled(self.ffn(self.norm2(x)), self.gamma_2)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma
