"""Polyline Path Masked Attention for Vision Transformer. arXiv 2506.15940, 2025.

Attention on an image whose logits fall along L-shaped paths from query to key. How much a step costs is read from
the input: every cell has a log factor for steps along its row and one for steps along its column, so that paths
across the border of an object can cost more than paths inside it. Two paths join two cells, one per corner; both
are attended by and the results averaged. At high resolution attention goes along rows and along columns instead.

    alpha, beta = -exp(A_h) softplus(x_h W + b_h)                (B, H, N) each, x_h (B, N, D), W (D, 2) for all heads
    R[y][x, x'] = sum of alpha[y, min(x, x')+1 .. max(x, x')]     along rows; C[x][y, y'] of beta along columns
    L[(y, x), (y', x')] = R[y][x, x'] + C[x'][y, y']              (B, H, N, N); L^T is the path with the other corner
    whole:   o = (softmax(S + L) v + softmax(S + L^T) v) / 2      S = q k^T / sqrt(D), q, k rotated by y W_grid + x
    chunk:   o = (A_C A_R v + A_R A_C v) / 2                      A_R = softmax(S + R) in rows, A_C in columns
    linear:  o = (exp(L) * S + exp(L^T) * S) v / 2                elementwise products; two scans, no N x N matrix
    out = (o + DWConv5x5(v)) W_o                                  (B, N, C)

The linear form follows the paper's remark that the mask serves linear attention too, applied by its fast algorithm;
the authors released no code for it, and its details (no feature map, no normaliser, as in Mamba-2) are inferred.
The block adds a 3 x 3 depthwise convolution in front, and one inside the feed-forward network.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.paths import path_linear_attention
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.layout import AsTokens
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.patterns.grids import Windows
from foveate.scores.pairs import Pairs
from foveate.scores.paths import column_decay, line_sums, path_decay, row_decay
from foveate.scores.rotary import rotate

Form = Literal["whole", "chunk", "linear"]

# The models attend to whole maps of 14 x 14 tokens and less, along rows and columns of 28 x 28 and more.
WHOLE = 400


class PathFactors(nn.Module):
    """Log factors of steps along rows and columns, from the input; never positive.

    Args:
        dim: channels C.
        heads: number of heads; each reads its own D channels with weights shared by all.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        width = check_heads(dim, heads)
        self.heads = heads
        self.steps = nn.Linear(width, 2, bias=False)
        self.bias = nn.Parameter(torch.empty(heads))
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw as published: steps between 0.001 and 0.1 before the input speaks, rates between 1 and 1.1."""
        nn.init.trunc_normal_(self.steps.weight, std=0.02)
        step = torch.empty_like(self.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is `step`
        self.log_rate.uniform_(1.0, 1.1).log_()

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
        """Return (along rows, along columns), in float32 or wider."""
        wide = accumulation_dtype(x.dtype)
        raw = self.steps(split_heads(x, self.heads)).to(wide) + self.bias.to(wide)[:, None, None]
        across, down = (-self.log_rate.to(wide).exp()[:, None, None] * functional.softplus(raw)).unbind(-1)
        return across, down


@system(
    key="polyline_path_attention",
    title="Polyline Path Masked Attention for Vision Transformer",
    arxiv="2506.15940",
    year=2025,
    family="scored",
    role="score",
    cost="O(N^2 C), in rows and columns O(N (H_grid + W_grid) C), linear O(N C^2 / H)",
    fidelity="vectors",
    dims=(2,),
    limits="Images only. The linear form is not in the authors' code.",
)
class PolylinePathAttention(nn.Module):
    """Attention that decays along L-shaped paths, by factors read from the input.

    Args:
        dim: channels C.
        heads: number of heads; `dim / heads` must be even, for the rotation.
        form: "whole" attends to the whole map, "chunk" along rows and columns, "linear" without softmax.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads` or `form`.
    """

    def __init__(self, *, dim: int, heads: int, form: Form = "whole", backend: str = "auto"):
        super().__init__()
        if check_heads(dim, heads) % 2:
            raise bad("heads", heads, f"an even number of channels per head, not {dim // heads}")
        if form not in get_args(Form):
            raise bad("form", form, f"one of {get_args(Form)}")
        self.dim, self.heads, self.backend = dim, heads, backend
        self.form: Form = form
        self.qkv = QKV(dim, heads)
        self.factors = PathFactors(dim, heads)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "PolylinePathAttention":
        """Return the form the models use at this size: whole maps up to 20 x 20, then rows and columns.

        Raises:
            ArgumentError: naming `causal`, or `grid` when it is not 2-d.
        """
        refuse_causal(causal, "paths lead both ways")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Paths have a corner.")
        return cls(dim=dim, heads=heads, form="whole" if grid.numel <= WHOLE else "chunk")

    def rotation(
        self, grid: Grid, *, like: Tensor | None = None
    ) -> tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]:
        """Return cosines and sines of the tokens' angles: by row-major index, slowest pair 1 / 10000 a step."""
        like = self.qkv.weight if like is None else like
        half = self.dim // self.heads // 2
        wide = accumulation_dtype(like.dtype)
        frequencies = 1.0 / 10000 ** torch.linspace(0, 1, half, dtype=wide, device=like.device)
        angles = torch.arange(grid.numel, dtype=wide, device=like.device)[:, None] * frequencies
        return angles.cos(), angles.sin()

    def lines(
        self, x: Float[Tensor, "b n c"], grid: Grid
    ) -> tuple[Float[Tensor, "b h n w"], Float[Tensor, "b h n h_grid"]]:
        """Return the log factors from every token to the cells of its row, and of its column."""
        across, down = self.factors(x)
        return line_sums(across, grid, 1), line_sums(down, grid, 0)

    def log_mask(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h n n"]:
        """Return L, all N x N of it, for pictures: along the query's row, then the key's column."""
        check_tokens(x, grid, self.dim, (2,))
        across, down = self.lines(x, grid)
        every = Pairs.full(grid.numel, grid.numel, device=x.device)
        return path_decay(across, down, grid).apply(across.new_zeros(()), every)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        q, k, v = self.qkv(x)
        cos, sin = self.rotation(grid, like=q)
        q, k = (rotate(part.to(cos.dtype), cos, sin, "interleaved").to(v.dtype) for part in (q, k))
        if self.form == "linear":
            out = self._linear(q, k, v, x, grid)
        else:
            mix = self._whole if self.form == "whole" else self._chunk
            out = mix(q, k, v, *self.lines(x, grid), grid)
        values = merge_heads(v)
        return self.proj(merge_heads(out) + AsTokens(self.lepe)(values, grid))

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, across: Tensor, down: Tensor, grid: Grid) -> Tensor:
        row, column = (
            attend(q, k, v, score=path_decay(across, down, grid, first=first), backend=self.backend)
            for first in ("row", "column")
        )
        return 0.5 * row + 0.5 * column

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, across: Tensor, down: Tensor, grid: Grid) -> Tensor:
        rows, columns = Windows(grid, (1, grid[1])), Windows(grid, (grid[0], 1))
        along, below = row_decay(across, grid), column_decay(down, grid)
        in_rows = attend(q, k, v, where=rows, score=along, backend=self.backend)
        # One pass over the columns serves both orders.
        both = torch.cat([in_rows, v], dim=-1)
        row_first, in_columns = attend(q, k, both, where=columns, score=below, backend=self.backend).chunk(
            2, -1
        )
        column_first = attend(q, k, in_columns, where=rows, score=along, backend=self.backend)
        return 0.5 * row_first + 0.5 * column_first

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        across, down = self.factors(x)
        wide = (part.to(across.dtype) for part in (q, k, v))
        q, k, values = wide
        scale = q.shape[-1] ** -0.5
        row, column = (
            path_linear_attention(q, k, values, across, down, grid, first=first, scale=scale)
            for first in ("row", "column")
        )
        return (0.5 * row + 0.5 * column).to(v.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, form={self.form!r}"


class ConvMLP(nn.Module):
    """Feed-forward network with a 3 x 3 depthwise convolution beside its hidden channels.

    Args:
        dim: channels in and out.
        hidden: channels between.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply it to the tokens of `grid`."""
        hidden = functional.gelu(self.fc1(x))
        return self.fc2(hidden + AsTokens(self.conv)(hidden, grid))


class PolylinePathBlock(nn.Module):
    """The block of the models: a depthwise convolution, attention and feed-forward, each with a residual.

    Args:
        dim, heads, form, backend: as in `PolylinePathAttention`.
        hidden: channels inside the feed-forward network.
        layer_scale: initial value of a factor per channel on both branches, None for no factors (the largest
            model has them in its last two stages, from 1e-6).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden: int,
        form: Form = "whole",
        layer_scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PolylinePathAttention(dim=dim, heads=heads, form=form, backend=backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMLP(dim, hidden)
        init = None if layer_scale is None else torch.full((dim,), layer_scale)
        self.scale1 = None if init is None else nn.Parameter(init.clone())
        self.scale2 = None if init is None else nn.Parameter(init.clone())

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.attn.dim, (2,))
        x = x + AsTokens(self.position)(x, grid)
        mixed = self.attn(self.norm1(x), grid)
        x = x + (mixed if self.scale1 is None else self.scale1 * mixed)
        changed = self.mlp(self.norm2(x), grid)
        return x + (changed if self.scale2 is None else self.scale2 * changed)
