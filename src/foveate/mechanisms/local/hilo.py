"""Fast Vision Transformers with HiLo Attention. arXiv 2205.13213, 2022.

Heads are divided between two frequencies. High-frequency heads look at what is near: attention inside small
windows that do not overlap. Low-frequency heads look at everything, coarsely: every token attends to the
means of the windows. Each kind has its own projections; their outputs stand side by side in the channels and
are mixed by no common projection. With H heads of width D, s x s windows and l = floor(alpha H):

    q, k, v = x W_h                      (B, H - l, N, D) each;  high: out_i over the window of i
    q' = x W_q,  k', v' = pool_s(x) W_kv          (B, l, N, D) and (B, l, N / s^2, D);  low: out_i over all
    out = [attention(q, k, v) W_hp | attention(q', k', v') W_lp]                              (B, N, C)

pool_s takes the mean of a window of x, before any projection. With s = 1 there is nothing to be coarse
about: all heads are low-frequency ones and this is plain multi-head attention. Unlike in the authors' code,
windows need not divide the map; those at the border are smaller then, and so are their means.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, frozen, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Windows
from foveate.routing.regions import Regions


@system(
    key="hilo",
    title="Fast Vision Transformers with HiLo Attention",
    arxiv="2205.13213",
    year=2022,
    family="local",
    role="module",
    cost="O(N (s^2 + N / s^2) C), s^2 = prod(window)",
    fidelity="vectors",
    limits="Low-frequency heads are quadratic in N, divided by s^2; no position term of its own.",
)
class HiLoAttention(nn.Module):
    """Window attention in some heads, attention to pooled windows in the others.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: s, an integer or one per axis; 1 makes all heads low-frequency ones, without pooling.
        alpha: share of low-frequency heads, 0 to 1; their number is rounded down.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads`, `window` or `alpha`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        window: int | Sequence[int] = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        self.window = frozen(window)
        sides = (self.window,) if isinstance(self.window, int) else self.window
        if not sides or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
            raise bad("window", window, "a positive integer, or one per axis")
        if not 0 <= alpha <= 1:
            raise bad("alpha", alpha, "a share between 0 and 1")
        self.dim, self.heads, self.alpha, self.scale, self.backend = dim, heads, alpha, scale, backend
        self.low_heads = heads if max(sides) == 1 else int(heads * alpha)
        self.high_heads = heads - self.low_heads
        low, high = self.low_heads * width, self.high_heads * width
        if high:
            self.high_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.high_proj = nn.Linear(high, high)
        if low:
            self.low_q = nn.Linear(dim, low, bias=qkv_bias)
            self.low_kv = nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.low_proj = nn.Linear(low, low)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "HiLoAttention":
        """Return the published share of low-frequency heads, 0.9 (all of them where there is one head).

        Windows are 2 wide, as in the authors' classifiers, and 4 wide, as in their detectors, on grids with
        more than 16 tokens along every axis.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "windows are pooled over their future tokens too")
        window = 4 if min(grid) > 16 else 2
        return cls(dim=dim, heads=heads, window=window, alpha=0.9 if heads > 1 else 1.0)

    def where(self, grid: Grid) -> Windows:
        """Return whom the high-frequency heads see: windows, cut off at the border of `grid`."""
        return Windows(grid, self._sides(grid))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`; high-frequency channels come first.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (1, 2, 3) if isinstance(self.window, int) else (len(self.window),))
        parts = []
        if self.high_heads:
            parts.append(self._high(x, grid))
        if self.low_heads:
            parts.append(self._low(x, grid))
        return torch.cat(parts, dim=-1)

    def _high(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = (split_heads(part, self.high_heads) for part in self.high_qkv(x).chunk(3, dim=-1))
        out = attend(q, k, v, where=self.where(grid), scale=self.scale, backend=self.backend)
        return self.high_proj(merge_heads(out))

    def _low(self, x: Tensor, grid: Grid) -> Tensor:
        sides = self._sides(grid)
        means = x if max(sides) == 1 else Regions(grid, sides).pool(x)
        q = split_heads(self.low_q(x), self.low_heads)
        k, v = (split_heads(part, self.low_heads) for part in self.low_kv(means).chunk(2, dim=-1))
        return self.low_proj(merge_heads(attend(q, k, v, scale=self.scale, backend=self.backend)))

    def _sides(self, grid: Grid) -> tuple[int, ...]:
        sides = grid.per_axis(self.window, "window")
        return tuple(min(s, size) for s, size in zip(sides, grid, strict=True))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, alpha={self.alpha}"
