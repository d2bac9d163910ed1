"""VSA: Learning Varied-Size Window Attention in Vision Transformers. arXiv 2204.08446, 2022.

Queries stay in fixed windows of M x M; where their keys and values come from is learned. For every window and
head two small predictors, fed with the average of the window, give a factor and an offset per axis; M x M keys
and values are read from the stretched and moved window between the pixels. So one layer may look across window
borders, each head at a distance and size of its own, at the price of window attention. With windows w, their
centre m_w, pixels p of the map of n_x pixels, W_x = floor(n_x / M) windows, per axis and padded size n'_x:

    f_w = leaky_relu(mean_{p in w} x_p);   s_w = f_w W_s;   o_w = f_w W_o                       (B, H, 2)
    y_p = p + (p - m_w) s_w + o_w / W_x (n'_x - 1) / 2                                    (B, H, N, 2)
    k'_p, v'_p = k(y_p), v(y_p), bilinear, 0 outside the map                              (B, H, N, D)
    out_i = sum_{j in window(i)} softmax_j(q_i . k'_j / sqrt(D) + bias[h, i - j]) v'_j    (B, H, N, D)

The factor counts on top of 1: where both predictors give 0, which is how they start here (as the paper says;
in the authors' code the reset is never called), this is window attention. The bias keeps the offsets of the
unmoved window. Keys read outside the map are 0 but take part, as published. A map that windows do not divide is
padded after the last row and column; its windows are counted without the padding, at least one. Maps of 1 and
3 axes are ours, by the same equation.
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.sample import sample
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.positions import RelativeBias
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Windows

WINDOWS = {1: (49, 64), 2: (7, 8), 3: (4, 4)}
POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


@system(
    key="varied_size_window",
    title="VSA: Learning Varied-Size Window Attention in Vision Transformers",
    arxiv="2204.08446",
    year=2022,
    family="local",
    role="module",
    cost="O(N (M^2 + 1) C), M^2 = prod(window)",
    fidelity="vectors",
    primitive="attend, sample",
    limits="A window is moved and stretched along the axes only; keys read outside the map are zeros that count.",
)
class VariedSizeWindowAttention(nn.Module):
    """Window attention whose keys and values are read from learned windows, one per window and head.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: window size per axis, one integer per axis of the grids it will see (an integer: a square).
        out_dim: channels of q, k, v and of the output; `dim` when None. `heads` must divide it.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads` or `window`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        check_heads(dim, heads)
        check_heads(out_dim, heads)
        self.window = Grid(*((window, window) if isinstance(window, int) else window)).sizes
        self.dim, self.heads, self.out_dim = dim, heads, out_dim
        self.scale, self.backend = scale, backend
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias)
        # Rows are grouped by head, then by axis, the last axis of the map first (x, y, z).
        self.offsets = nn.Linear(dim, heads * len(self.window))
        self.scales = nn.Linear(dim, heads * len(self.window))
        self.position = RelativeBias(heads, self.window, sign="query-key")
        self.proj = nn.Linear(out_dim, out_dim)
        for predictor in (self.offsets, self.scales):
            nn.init.zeros_(predictor.weight)
            nn.init.zeros_(predictor.bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "VariedSizeWindowAttention":
        """Return windows of 7 x 7 or 8 x 8 (on images), whichever divides `grid`.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "windows look both ways, and move")
        published, even = WINDOWS[grid.ndim]
        side = published if all(size % published == 0 for size in grid) else even
        return cls(dim=dim, heads=heads, window=(side,) * grid.ndim)

    def padded(self, grid: Grid) -> Grid:
        """Return `grid` grown to whole windows."""
        return Grid(*(-(-size // m) * m for size, m in zip(grid, self.window, strict=True)))

    def windows(self, grid: Grid) -> Windows:
        """Return who attends to which read key: the windows of the padded grid."""
        return Windows(self.padded(grid), self.window)

    def positions(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h padded axes"]:
        """Return where the keys of every token of the padded grid are read, in pixels, x first.

        Computed in float32 at least: a position in half precision would miss its pixel.
        """
        wide, axes = accumulation_dtype(x.dtype), grid.ndim
        whole = self.padded(grid)
        pooled = POOL[axes](_grown(x, grid, whole).unflatten(1, whole.sizes).movedim(-1, 1), self.window)
        features = functional.leaky_relu(pooled.flatten(2).transpose(1, 2))
        offset, scale = (
            split_heads(f(features), self.heads).to(wide)[:, :, window_ids(grid, self.window)]
            for f in (self.offsets, self.scales)
        )
        pixel, relative = window_coords(grid, self.window, wide)
        # In the authors' coordinates a map is 2 wide; its windows are counted without the padding.
        unit = [
            (big - 1) / 2 / max(1, size // m) for size, big, m in zip(grid, whole, self.window, strict=True)
        ]
        unit = torch.tensor(unit[::-1], dtype=wide, device=x.device)
        return pixel.to(x.device) + relative.to(x.device) * scale + offset * unit

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.window),))
        whole = self.padded(grid)
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(x).chunk(3, dim=-1))
        both = torch.cat([k, v], dim=-1).transpose(2, 3).unflatten(3, grid.sizes)
        points = self.positions(x, grid)[:, :, :, None, None]
        k, v = sample([both], points, coords="pixels")[:, :, :, 0, 0].chunk(2, dim=-1)
        out = attend(
            _grown(q.flatten(0, 1), grid, whole).unflatten(0, q.shape[:2]),
            k,
            v,
            where=self.windows(grid),
            score=self.position(whole),
            scale=self.scale,
            backend=self.backend,
        )
        out = merge_heads(out).unflatten(1, whole.sizes)
        return self.proj(out[(slice(None), *map(slice, grid.sizes))].flatten(1, -2))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, out_dim={self.out_dim}"


def window_ids(grid: Grid, window: Sequence[int]) -> Int[Tensor, " padded"]:
    """Return the window of every token of the padded grid, counted row-major."""
    counts = Grid(*(-(-size // m) for size, m in zip(grid, window, strict=True)))
    whole = Grid(*(n * m for n, m in zip(counts, window, strict=True)))
    return counts.ravel(at // m for at, m in zip(whole.coords().unbind(-1), window, strict=True))


def window_coords(
    grid: Grid, window: Sequence[int], dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "padded axes"], Float[Tensor, "padded axes"]]:
    """Return every token of the padded grid, and how far it is from the centre of its window, in pixels.

    The last axis of the grid comes first (x, y, z).
    """
    whole = Grid(*(-(-size // m) * m for size, m in zip(grid, window, strict=True)))
    coords, sides = whole.coords(), torch.tensor(window)
    return coords.flip(-1).to(dtype), (coords % sides - (sides - 1) / 2).flip(-1).to(dtype)


def reference_points(grid: Grid, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the authors' constants, in coordinates that run from -1 to 1 over the padded map.

    Returns:
        Where the keys of an unmoved window are read, and their offsets from its centre; each in the authors'
        layout (1, axes, windows, M, windows, M, ...), x first.
    """
    pixel, relative = window_coords(grid, window)
    counts = [-(-size // m) for size, m in zip(grid, window, strict=True)]
    sizes = torch.tensor([n * m for n, m in zip(counts, window, strict=True)]).flip(0)
    shape = [part for n, m in zip(counts, window, strict=True) for part in (n, m)]
    base, coords = 2 * pixel / (sizes - 1) - 1, 2 * relative / (sizes - 1)
    return base.T.reshape(1, -1, *shape).float(), coords.T.reshape(1, -1, *shape).float()


def _grown(x: Float[Tensor, "b n c"], grid: Grid, whole: Grid) -> Float[Tensor, "b padded c"]:
    """Put zeros behind the last row, column, ... of a map of tokens."""
    if grid == whole:
        return x
    after = [
        size for a, b in zip(reversed(grid.sizes), reversed(whole.sizes), strict=True) for size in (0, b - a)
    ]
    y = functional.pad(x.unflatten(1, grid.sizes), (0, 0, *after))
    return y.reshape(x.shape[0], prod(whole.sizes), x.shape[2])
