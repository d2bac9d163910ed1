"""Scaling Local Self-Attention for Parameter Efficient Visual Backbones. arXiv 2103.12731, 2021.

The map is cut into blocks of b x b queries that do not overlap, and all queries of a block attend to one
window, the block and a halo of h tokens around it: windows overlap like those of a convolution, but are
gathered once a block. Position enters as logits that depend on the query: its product with an embedding of the
offset along each axis. Around the map stand zero keys and values; they are not masked, so they get position
logits and count in the denominator. To downsample, only every second query of a block asks.

    q = x W_q (B, H, N / s^2, D),  k = x W_k (B, H, N, D),  v = x W_v (B, H, N, D_v)
    window(i): positions n b - h .. n b + b + h - 1 along each axis, n = i // b
    out_i = sum_{j in window(i)} softmax_j(q_i . k_j / sqrt(D) + sum_a q_i . R_a[(j - i)_a + h + w - 1]) v_j
    R_a (2 w - 1, D), w = b + 2 h; the q of the position term is not scaled (scale_position=True scales it)

The authors' code is not public; parity is with the port in timm, which has no projection after the heads and
sums one embedding of full width per axis. With strided queries that port counts offsets as if the queries of a
block stood side by side; here they are where they are, and `official=True` counts as it does. Unlike the port,
blocks need not divide the map.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Halo
from foveate.patterns.subsample import Subsampled
from foveate.scores.bias import Coords, Gathered

# Block and halo per axis for 1-, 2- and 3-d grids; published for images.
DEFAULTS = {1: (32, 12), 2: (8, 3), 3: (4, 1)}
POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
# The paper's family: block, halo, ratio of values' width, ratio of the bottleneck's, layers of the third stage,
# width of the final 1 x 1 convolution.
VARIANTS = {
    "H0": (8, 3, 1.0, 0.5, 7, None),
    "H1": (8, 3, 1.0, 1.0, 10, None),
    "H2": (8, 3, 1.0, 1.25, 11, None),
    "H3": (10, 3, 1.0, 1.5, 12, 1024),
    "H4": (12, 2, 1.0, 3.0, 12, 1280),
    "H5": (14, 2, 2.5, 2.0, 23, 1536),
    "H6": (8, 4, 3.0, 2.75, 24, 1536),
    "H7": (10, 3, 4.0, 3.5, 26, 2048),
}


@system(
    key="halonet",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    arxiv="2103.12731",
    year=2021,
    family="local",
    role="pattern",
    cost="O(N (b + 2h)^2 C), blocks of b^2 queries",
    fidelity="vectors",
    limits="One layer sees at most b + h - 1 tokens away; heads are not mixed by a projection of its own.",
)
class HaloAttention(nn.Module):
    """Blocked local attention with halos and position logits that depend on the query.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim_out`.
        block: queries of a block per axis, one integer per axis of the grids it will see (an integer: a
            square). On smaller maps a block is the map.
        halo: tokens added on each side of a block, one integer or one per axis.
        stride: 1, or by how much the map is downsampled along every axis.
        dim_out: channels of the output, `dim` when None.
        head_dim: width of queries and keys, `dim_out / heads` when None.
        qkv_bias: whether the q, k, v projections have a bias (keys outside the map never do).
        avg_down: downsample by averaging the output instead of by strided queries; also done where `stride`
            does not divide `block`.
        scale_position: whether position logits are scaled by 1 / sqrt(head_dim) too.
        official: with strided queries, count offsets as the port does: in queries, not in tokens.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `block`, `halo`, `stride`, `dim_out` or `heads`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        block: int | Sequence[int] = 8,
        halo: int | Sequence[int] = 3,
        stride: int = 1,
        dim_out: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_position: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.dim_out = dim if dim_out is None else dim_out
        width = check_heads(self.dim_out, heads)
        blocks = Grid(*((block, block) if isinstance(block, int) else block))
        self.block, self.halo = blocks.sizes, blocks.per_axis(halo, "halo")
        if min(self.halo) < 0:
            raise bad("halo", halo, "integers >= 0")
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise bad("stride", stride, "a positive integer")
        self.dim, self.heads, self.stride, self.backend = dim, heads, stride, backend
        self.scale_position, self.official = scale_position, official
        pooled = avg_down or any(b % stride for b in self.block)
        self.query_stride, self.pool_stride = (1, stride) if pooled else (stride, 1)
        self.head_dim = width if head_dim is None else head_dim
        self.q = nn.Linear(dim, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, self.dim_out, bias=qkv_bias)
        reaches = [b + 2 * h for b, h in zip(self.block, self.halo, strict=True)]
        self.rel = nn.ParameterList(torch.empty(2 * w - 1, self.head_dim) for w in reaches)
        self.reset_parameters()

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "HaloAttention":
        """Return blocks of 8 x 8 with a halo of 3 (on images), as published for H0 to H2.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "a block looks to both sides")
        block, halo = DEFAULTS[grid.ndim]
        return cls(dim=dim, heads=heads, block=(block,) * grid.ndim, halo=halo)

    def reset_parameters(self) -> None:
        """Draw projections with standard deviation C^-1/2 and embeddings with D^-1/2, truncated normals."""
        for linear in (self.q, self.k, self.v):
            nn.init.trunc_normal_(linear.weight, std=self.dim**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for table in self.rel:
            nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    def where(self, grid: Grid) -> Halo | Subsampled:
        """Return who attends to whom on `grid`; phantom keys stand outside."""
        block = tuple(min(b, size) for b, size in zip(self.block, grid, strict=True))
        halo = Halo(grid, block, self.halo, border="zero")
        return halo if self.query_stride == 1 else Subsampled(halo, self.query_stride)

    def grid_out(self, grid: Grid) -> Grid:
        """Return the grid of the output."""
        if self.pool_stride > 1:
            return Grid(*(size // self.pool_stride for size in grid))
        return Grid(*(-(-size // self.query_stride) for size in grid))

    def position(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Gathered, ...]:
        """Return the position logits of queries `q`, one score per axis; axes add."""
        scale = self.head_dim**-0.5 if self.scale_position else 1.0
        asks = Grid(*(-(-size // self.query_stride) for size in grid))
        return tuple(
            Gathered(q @ (table * scale).T, self._index(axis), grid=grid, query_grid=asks, clip=True)
            for axis, table in enumerate(self.rel)
        )

    def _index(self, axis: int) -> Callable[[Coords, Coords], Tensor]:
        """Return which row of an axis's embeddings a pair of one window reads."""
        s, block, halo = self.query_stride, self.block[axis], self.halo[axis]
        middle = halo + block + 2 * halo - 1

        def offset(q: Coords, k: Coords) -> Tensor:
            return k[axis] - s * q[axis] + middle

        def side_by_side(q: Coords, k: Coords) -> Tensor:
            first, own = q[axis] * s // block * block, q[axis] % (block // s)
            return k[axis] - first - own + middle

        return side_by_side if self.official and s > 1 else offset

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m c_out"]:
        """Mix the tokens of `grid`.

        Returns:
            (B, M, dim_out), tokens of `grid_out(grid)`: M = N with stride 1.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.block),))
        if self.pool_stride > min(grid):
            raise bad("grid", grid, f"axes of at least {self.pool_stride} tokens, which are averaged")
        asking = x
        if self.query_stride > 1:
            every = (slice(None), *(slice(None, None, self.query_stride) for _ in grid))
            asking = x.unflatten(1, grid.sizes)[every].flatten(1, -2)
        q = split_heads(self.q(asking), self.heads)
        k, v = (split_heads(project(x), self.heads) for project in (self.k, self.v))
        out = attend(q, k, v, where=self.where(grid), score=self.position(q, grid), backend=self.backend)
        out = merge_heads(out)
        if self.pool_stride > 1:
            spatial = out.transpose(1, 2).unflatten(2, grid.sizes)
            out = POOLS[grid.ndim](spatial, self.pool_stride).flatten(2).transpose(1, 2)
        return out

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, dim_out={self.dim_out}, heads={self.heads}, block={self.block}, "
            f"halo={self.halo}, stride={self.stride}"
        )
