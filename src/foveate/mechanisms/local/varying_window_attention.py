"""Multi-Scale Representations by Varying Window Attention for Semantic Segmentation. arXiv 2404.16573, 2024.

The map is cut into a fixed number of windows per axis, of P x P tokens each. Queries stay in their window;
what they look at is a context R times as wide around it, brought down to P x P keys again, so that every R
costs as much as plain window attention. First a convolution over R x R neighbours makes R^2 times fewer
channels of the map; then every R x R block of the context is stacked into the channels of one key. With x
(B, N, C):

    e = relu(bn(conv_RxR(x)))                          (B, C / R^2, H, W), zeros beyond the map
    z_j = [e at the R x R tokens of block j of the context of window w]      (B, P^2, C) per window
    y_i = sum_{j < P^2} softmax_j(x_i W_q . z_j W_k / sqrt(D)) z_j W_v;  branch_R = bn(y W) (+ x)
    out = relu(bn([local(x) | pool(x) | branch_R1 | branch_R2 | ...] W_fuse))               (B, N, C)

At the border the context is filled by copy-shift padding: what is missing on one side is copied from the far
end of the context that was moved inside, so that a border window looks at the R P x R P tokens nearest to it,
in cyclic order, and at no zeros. `local` is a 1 x 1 convolution, `pool` the mean of the map through another;
both with batch norm and ReLU. Branches equal the authors' code on vectors, for which mmcv's layers were
replaced by others of the same mathematics; the fusion follows their code without vectors. Contexts wider than
the map, which they fill with zeros, are refused.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, frozen, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Windows
from foveate.patterns.patches import Patches


class VaryingWindowBranch(nn.Module):
    """Attention of windows to contexts `ratio` times as wide, for one ratio.

    Args:
        dim: channels C; a multiple of ratio^2.
        heads: number of heads; must divide `dim` / `reduction`.
        ratio: R, at most `windows`.
        windows: windows per axis; must divide the map.
        shortcut: whether the input is added.
        reduction: channels of q, k and v are `dim` / `reduction`.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads`, `ratio`, `windows` or `reduction`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        ratio: int,
        windows: int | Sequence[int] = 8,
        shortcut: bool = False,
        reduction: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        counts = Grid(1, 1).per_axis(windows, "windows")
        if min(counts) < 1:
            raise bad("windows", windows, "a positive integer, or one per axis")
        if isinstance(ratio, bool) or not isinstance(ratio, int) or not 1 <= ratio <= min(counts):
            hint = "A wider context than the map has nothing to copy."
            raise bad("ratio", ratio, f"an integer from 1 to windows={windows}", hint)
        if dim % (ratio * ratio):
            raise bad(
                "dim", dim, f"a multiple of ratio^2={ratio * ratio}", "Blocks are stacked into channels."
            )
        if reduction < 1 or dim % reduction:
            raise bad("reduction", reduction, f"a positive divisor of dim={dim}")
        inner = dim // reduction
        check_heads(inner, heads)
        self.dim, self.heads, self.ratio, self.windows = dim, heads, ratio, frozen(windows)
        self.shortcut, self.backend = shortcut, backend
        before, after = (ratio - 1) // 2, ratio // 2
        self.embed = nn.Sequential(
            nn.ZeroPad2d((before, after, before, after)),
            nn.Conv2d(dim, dim // (ratio * ratio), ratio, bias=False),
            nn.BatchNorm2d(dim // (ratio * ratio)),
            nn.ReLU(),
        )
        self.q = nn.Linear(dim, inner)
        self.kv = nn.Linear(dim, 2 * inner)
        self.proj = nn.Linear(inner, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)

    def where(self, grid: Grid) -> Windows:
        """Return whom queries see: the keys of their window, which stand where its tokens stand.

        Raises:
            ArgumentError: naming `grid`, unless the windows divide it.
        """
        counts = grid.per_axis(self.windows, "windows")
        if any(n % count for n, count in zip(grid, counts, strict=True)):
            raise bad("grid", grid, f"sides that windows={self.windows} divides", "Pad or resize the map.")
        return Windows(grid, tuple(n // count for n, count in zip(grid, counts, strict=True)))

    def contexts(self, grid: Grid) -> Int[Tensor, "n blocks"]:
        """Return for the key at every token the R x R tokens whose channels it is made of."""
        size, ratio = self.where(grid).size, self.ratio
        counts = tuple(n // p for n, p in zip(grid, size, strict=True))
        wide = tuple(ratio * p for p in size)
        start = tuple((ratio + 1) * p // 2 - ratio * p for p in size)
        tokens = Patches(grid, wide, stride=size, counts=counts, start=start, border="shift").tokens
        blocks = tokens.reshape(*counts, size[0], ratio, size[1], ratio)
        # (window row, window column, row, within, column, within) -> tokens of the map, blocks
        return blocks.permute(0, 2, 1, 4, 3, 5).reshape(grid.numel, ratio * ratio)

    def keys(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Return z, the rescaled contexts, those of a window at the places of its tokens."""
        embedded = self.embed(to_map(x, grid)).flatten(2).transpose(1, 2)
        return embedded[:, self.contexts(grid).to(x.device)].flatten(2)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        where = self.where(grid)
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(self.keys(x, grid)).chunk(2, dim=-1))
        out = self.proj(merge_heads(attend(q, k, v, where=where, backend=self.backend)))
        out = self.norm(out.transpose(1, 2)).transpose(1, 2)
        return x + out if self.shortcut else out

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, ratio={self.ratio}, windows={self.windows}"


@system(
    key="varying_window_attention",
    title="Multi-Scale Representations by Varying Window Attention for Semantic Segmentation",
    arxiv="2404.16573",
    year=2024,
    family="local",
    role="module",
    cost="O(N C (C + P^2)) per ratio, whatever the ratio",
    fidelity="vectors",
    dims=(2,),
    sizes="sides that the number of windows divides",
    limits="Windows are fixed by count; in training, batch norm couples samples and needs two of them.",
)
class VaryingWindowAttention(nn.Module):
    """Windows that look at contexts of several widths, fused with a local and a global path.

    Args:
        dim: channels C; a multiple of every ratio^2.
        heads: number of heads of each branch; must divide `dim` / `reduction`.
        ratios: R of each branch, at most `windows`.
        windows: windows per axis; must divide the map.
        shortcut: whether every branch adds its input.
        reduction: channels of q, k and v are `dim` / `reduction`.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads`, `ratios`, `ratio`, `windows` or `reduction`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        ratios: Sequence[int] = (2, 4, 8),
        windows: int | Sequence[int] = 8,
        shortcut: bool = False,
        reduction: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        if not ratios:
            raise bad("ratios", ratios, "at least one ratio")
        self.dim, self.heads, self.ratios, self.windows = dim, heads, tuple(ratios), frozen(windows)
        self.branches = nn.ModuleList(
            VaryingWindowBranch(
                dim=dim,
                heads=heads,
                ratio=ratio,
                windows=windows,
                shortcut=shortcut,
                reduction=reduction,
                backend=backend,
            )
            for ratio in ratios
        )
        self.local = conv_norm(dim, dim)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm(dim, dim))
        self.fuse = conv_norm((2 + len(ratios)) * dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "VaryingWindowAttention":
        """Return 8 windows per axis or as many as divide the map into windows of 4 x 4 tokens or more.

        On small maps windows of 2 x 2 tokens do. Ratios are those of 2, 4 and 8 (published) that the windows
        hold and the channels can be divided by.

        Raises:
            ArgumentError: naming `causal`, `grid` when no such windows divide it, or `dim`.
        """
        refuse_causal(causal, "contexts surround their window")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "The embedding is a convolution over a map.")
        check_heads(dim, heads)
        common = math.gcd(*grid)
        fits = [w for side in (4, 2) for w in range(8, 1, -1) if common % w == 0 and min(grid) >= w * side]
        if not fits:
            raise bad("grid", grid, "sides that 2 to 8 windows of at least 2 tokens divide")
        ratios = tuple(r for r in (2, 4, 8) if r <= fits[0] and dim % (r * r) == 0)
        if not ratios:
            raise bad(
                "dim",
                dim,
                "a multiple of 4",
                "A context twice as wide is stacked into 4 times fewer channels.",
            )
        return cls(dim=dim, heads=heads, ratios=ratios, windows=fits[0])

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` (also a batch of one in training) or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        if self.training and len(x) == 1:
            hint = "The pooled map is one number per sample and channel, which batch norm cannot norm alone."
            raise bad("x", tuple(x.shape), "two samples or more in training", hint)
        image = to_map(x, grid)
        paths = [self.local(image), self.pool(image).expand(-1, -1, *grid.sizes)]
        paths += [to_map(branch(x, grid), grid) for branch in self.branches]
        return self.fuse(torch.cat(paths, dim=1)).flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, ratios={self.ratios}, windows={self.windows}"


def conv_norm(dim: int, out: int) -> nn.Sequential:
    """Return a 1 x 1 convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(dim, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def to_map(x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b c h w"]:
    """Lay tokens out on their grid."""
    return x.transpose(1, 2).unflatten(2, grid.sizes)
