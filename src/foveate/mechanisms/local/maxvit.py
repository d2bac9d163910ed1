"""MaxViT: Multi-Axis Vision Transformer. arXiv 2204.01697, 2022.

Two attentions of linear cost, one after the other. Block attention looks inside windows of P x P tokens; grid
attention looks at G x G tokens spread evenly over the whole map, those at the same place of their cell. Block
then grid lets every token reach every other in two steps. A block of the network is an inverted bottleneck
convolution (MBConv), then either attention with a feed-forward network after it.

    q, k, v = x W + b                                                           (B, H, N, D) each
    block: A(i) = { j : j // P = i // P },   grid: A(i) = { j : j mod (L / G) = i mod (L / G) }    per axis
    out_i = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D) + bias[h, o + P - 1]) v_j,
    o = j - i in tokens (block) or in cells of L / G tokens (grid): key minus query, the other way than Swin
    MaxViT block: x = MBConv(x);  twice, block then grid:  x = x + attn(norm(x)),  x = x + mlp(norm(x))
    MBConv(x) = shortcut(x) + shrink(se(act(bn(depthwise(act(bn(expand(bn(x))))))))),  all maps (B, C, H, W)

GELU is its tanh approximation, convolutions and pools are padded as TensorFlow's 'same' (more at the end),
layer norms have eps 1e-5 and batch norms 1e-3, as in the authors' code.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_spatial, check_tokens, refuse_causal
from foveate.mechanisms.positions import RelativeBias
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.grids import Lattice, Windows
from foveate.scores.relative import RelativeTable

Partition = Literal["block", "grid"]
# Tokens per axis for 1-, 2- and 3-d grids; published for images.
WINDOWS = {1: 49, 2: 7, 3: 4}


@system(
    key="maxvit",
    title="MaxViT: Multi-Axis Vision Transformer",
    arxiv="2204.01697",
    year=2022,
    family="local",
    role="pattern",
    cost="O(N P^2 C), P^2 = prod(window)",
    fidelity="vectors",
    sizes="every axis a multiple of the window, or smaller (grid attention)",
    limits="One layer alone is local, or blind between its grid points; alternate block and grid.",
)
class PartitionAttention(nn.Module):
    """Multi-head attention inside windows or on the points of a grid, with a relative position bias.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: P or G, tokens per axis that attend to one another; one integer per axis of the grids it will
            see (an integer: a square).
        partition: "block" for windows, "grid" for points spread over the whole map.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `window` or `partition`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        partition: Partition = "block",
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if partition not in ("block", "grid"):
            raise bad("partition", partition, "'block' or 'grid'")
        self.window = Grid(*((window, window) if isinstance(window, int) else window)).sizes
        self.dim, self.heads, self.backend = dim, heads, backend
        self.partition: Partition = partition
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.position = RelativeBias(heads, self.window, sign="key-query")
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 1
    ) -> "PartitionAttention":
        """Return the divisor of each axis nearest to 7 (on images); odd layers take the grid, even ones windows.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "windows and grids look both ways")
        near = WINDOWS[grid.ndim]
        divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in grid]
        window = [min(found, key=lambda d: (abs(d - near), d)) for found in divisors]
        return cls(dim=dim, heads=heads, window=window, partition="grid" if layer % 2 else "block")

    def where(self, grid: Grid) -> Windows | Lattice:
        """Return who attends to whom on `grid`.

        Raises:
            ArgumentError: naming `grid` where a longer axis is no multiple of the grid attention's window.
        """
        window = tuple(min(w, size) for w, size in zip(self.window, grid, strict=True))
        if self.partition == "block":
            return Windows(grid, window)
        if any(size % w for size, w in zip(grid, window, strict=True)):
            raise bad("grid", grid, f"axes that are multiples of window={self.window}, or smaller")
        return Lattice(grid, window)

    def score(self, grid: Grid) -> RelativeTable:
        """Return the position bias on `grid`; grid attention counts offsets in cells."""
        if self.partition == "block":
            return self.position(grid)
        cells = tuple(max(1, size // w) for size, w in zip(grid, self.window, strict=True))
        return RelativeTable(self.position.table, grid, sign="key-query", step=cells)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.window),))
        q, k, v = self.qkv(x)
        out = attend(q, k, v, where=self.where(grid), score=self.score(grid), backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, partition={self.partition!r}"


class PartitionBlock(nn.Module):
    """The transformer block around `PartitionAttention`: pre-norm, MLP, residuals.

    Args:
        dim, heads, window, partition, qkv_bias, backend: as in `PartitionAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        partition: Partition = "block",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = PartitionAttention(
            dim=dim, heads=heads, window=window, partition=partition, qkv_bias=qkv_bias, backend=backend
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        act = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), act, nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class MBConv(nn.Module):
    """An inverted bottleneck with squeeze and excitation: widen, filter depthwise, weigh channels, narrow.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        stride: 1, or 2 to halve the map.
        expansion: width inside over `dim_out`.
        squeeze: width of the squeezed channels over `dim_out`.

    Raises:
        ArgumentError: naming `stride`.
    """

    def __init__(
        self, *, dim: int, dim_out: int, stride: int = 1, expansion: float = 4.0, squeeze: float = 0.25
    ):
        super().__init__()
        if stride not in (1, 2):
            raise bad("stride", stride, "1 or 2")
        wide, narrow = int(dim_out * expansion), max(1, int(dim_out * squeeze))
        self.dim, self.stride = dim, stride
        self.pre_norm = nn.BatchNorm2d(dim, eps=1e-3)
        self.expand = nn.Conv2d(dim, wide, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide, eps=1e-3)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride=stride, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide, eps=1e-3)
        self.act = nn.GELU(approximate="tanh")
        self.se = nn.Sequential(
            nn.Conv2d(wide, narrow, 1), nn.SiLU(), nn.Conv2d(narrow, wide, 1), nn.Sigmoid()
        )
        self.shrink = nn.Conv2d(wide, dim_out, 1)
        self.shortcut = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """Apply it to a map of any size; an odd side of n comes out as (n + 1) / 2 with stride 2."""
        check_spatial(x, self.dim)
        y = self.act(self.norm1(self.expand(self.pre_norm(x))))
        # 'Same' padding of a 3-wide filter: an even side with stride 2 is padded at its end only.
        edges = [int(self.stride == 1 or size % 2 == 1) for size in x.shape[2:]]
        y = self.depthwise(functional.pad(y, (edges[1], 1, edges[0], 1)))
        y = self.act(self.norm2(y))
        y = self.shrink(y * self.se(y.mean((2, 3), keepdim=True)))
        if self.stride > 1:
            x = functional.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.shortcut(x) + y


class MaxViTBlock(nn.Module):
    """MBConv, block attention and grid attention, each attention with a feed-forward network.

    Args:
        dim: channels of the input.
        dim_out: channels of the output, `dim` when None.
        heads: number of heads; must divide `dim_out` (published: 32 channels a head).
        window: P of block attention.
        lattice: G of grid attention, `window` when None.
        stride: 1, or 2 to halve the map.
        expansion: width inside MBConv and the MLPs over `dim_out`.
        squeeze: as in `MBConv`.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dim_out: int | None = None,
        window: int | Sequence[int] = 7,
        lattice: int | Sequence[int] | None = None,
        stride: int = 1,
        expansion: float = 4.0,
        squeeze: float = 0.25,
        backend: str = "auto",
    ):
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        check_heads(dim_out, heads)
        self.conv = MBConv(dim=dim, dim_out=dim_out, stride=stride, expansion=expansion, squeeze=squeeze)
        both: tuple[tuple[Partition, int | Sequence[int]], ...] = (
            ("block", window),
            ("grid", window if lattice is None else lattice),
        )
        self.attn_block, self.attn_grid = (
            PartitionBlock(
                dim=dim_out, heads=heads, window=size, partition=kind, mlp_ratio=expansion, backend=backend
            )
            for kind, size in both
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """Apply the block to a map whose sides, after the stride, are multiples of the windows.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        x = self.conv(x)
        grid = Grid(*x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.attn_grid(self.attn_block(tokens, grid), grid)
        return tokens.transpose(1, 2).unflatten(2, grid.sizes)
