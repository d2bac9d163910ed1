"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows. arXiv 2103.14030, 2021.

Tokens attend inside non-overlapping windows of M x M, with a learned bias per head and offset. Every second
layer moves the windows by M // 2, so that neighbouring windows exchange what they know. The authors roll
the map and mask what was wrapped around; that equals windows that start `shift` later, with smaller ones at
the borders, which is what the pattern here says directly (and their mask of -100 becomes true exclusion).

    q, k, v = x W                                                           (B, H, N, D) each
    out_i = sum_{j in window(i)} softmax_j(q_i . k_j / sqrt(D) + bias[h, i - j]) v_j
    block: x = x + attention(norm(x));  x = x + mlp(norm(x))                (B, N, C)

As published, where a window does not fit the smaller side it shrinks to it and is not shifted. Unlike the
authors' code, windows need not divide the map.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_tokens, refuse_causal
from foveate.mechanisms.positions import RelativeBias
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.grids import Windows

WINDOWS = {1: (49, 64), 2: (7, 8), 3: (4, 4)}


@system(
    key="swin",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    arxiv="2103.14030",
    year=2021,
    family="local",
    role="pattern",
    cost="O(N M^2 C), M^2 = prod(window)",
    fidelity="vectors",
    limits="One layer never looks across its windows; alternate shifted and unshifted ones.",
)
class WindowAttention(nn.Module):
    """Multi-head attention inside (shifted) windows, with a relative position bias.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: window size per axis, one integer per axis of the grids it will see (an integer: a square).
        shift: how far the windows are moved, per axis; 0 <= shift < window.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `window` or `shift`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        self.shift = Grid(*self.window).per_axis(shift, "shift")
        if any(not 0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise bad("shift", shift, f"0 <= shift < window={self.window}")
        self.dim, self.heads, self.scale, self.backend = dim, heads, scale, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.position = RelativeBias(heads, self.window, sign="query-key")
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 1
    ) -> "WindowAttention":
        """Return windows of 7 x 7 or 8 x 8 (on images), whichever divides `grid`; odd layers are shifted.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "windows look both ways")
        published, even = WINDOWS[grid.ndim]
        side = published if all(size % published == 0 for size in grid) else even
        window = (side,) * grid.ndim
        return cls(dim=dim, heads=heads, window=window, shift=side // 2 if layer % 2 else 0)

    def where(self, grid: Grid) -> Windows:
        """Return the windows on `grid`.

        Square windows follow the authors: when the smallest side holds no more than one window, the window
        shrinks to that side on every axis and is not shifted. Others do so axis by axis.
        """
        if len(set(self.window)) == 1 and min(grid.sizes) <= self.window[0]:
            return Windows(grid, min(grid.sizes))
        window = tuple(min(w, size) for w, size in zip(self.window, grid.sizes, strict=True))
        fits = [w < size for w, size in zip(self.window, grid.sizes, strict=True)]
        shift = tuple(s if ok else 0 for s, ok in zip(self.shift, fits, strict=True))
        return Windows(grid, window, shift)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, mask: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Args:
            x: tokens.
            grid: their geometry.
            mask: a further mask, bool (True = may attend) or additive, broadcastable to (B, H, N, N).

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.window),))
        q, k, v = self.qkv(x)
        out = attend(
            q,
            k,
            v,
            where=self.where(grid),
            score=self.position(grid),
            mask=mask,
            scale=self.scale,
            backend=self.backend,
        )
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, shift={self.shift}"


class SwinBlock(nn.Module):
    """The transformer block around `WindowAttention`: pre-norm, GELU MLP, residuals.

    Args:
        dim, heads, window, shift, qkv_bias, scale, backend: as in `WindowAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim=dim,
            heads=heads,
            window=window,
            shift=shift,
            qkv_bias=qkv_bias,
            scale=scale,
            backend=backend,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


def window_tokens(grid: Grid, window: Sequence[int], shift: Sequence[int]) -> Int[Tensor, "windows m"]:
    """Return the token ids of each window of the map rolled by `-shift`, in the order of the authors' code.

    Args:
        grid: token geometry; `window` must divide it.
        window, shift: per axis.
    """
    ids = torch.arange(grid.numel).reshape(grid.sizes)
    axes = tuple(range(grid.ndim))
    ids = ids.roll(tuple(-s for s in shift), axes)
    # (n0, w0, n1, w1, ...) -> (n0, n1, ..., w0, w1, ...)
    split = [part for size, w in zip(grid, window, strict=True) for part in (size // w, w)]
    order = [2 * a for a in axes] + [2 * a + 1 for a in axes]
    return ids.reshape(split).permute(order).flatten(grid.ndim).flatten(0, -2)


def relative_position_index(window: Sequence[int]) -> Int[Tensor, "m m"]:
    """Return the authors' buffer: for tokens i, j of a window the entry of the flattened table, by i - j."""
    coords = Grid(*window).coords()
    offset = coords[:, None] - coords[None, :]
    index = torch.zeros_like(offset[..., 0])
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + offset[..., axis] + w - 1
    return index
