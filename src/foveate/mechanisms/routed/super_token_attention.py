"""Vision Transformer with Super Token Sampling. arXiv 2211.11167, 2023.

Tokens are clustered softly into a coarse grid of super tokens, as superpixels are; super tokens attend to one
another, and every token reads the result back through its own association. A token is associated with the
3 x 3 super tokens around its cell only, so that the two ways between tokens and super tokens are local
attention, and the quadratic part sees M tokens in place of N.

    s = mean over cells                                                      (B, M, C)
    Q = softmax over 9 neighbours of (x s^T / sqrt(C))                       (B, N, M), never formed
    s = Q^T x / (Q^T 1), repeated `iterations` times
    out = Q MHSA(s)                                                          (B, N, C)

Q carries no gradient: it is a choice, and only the last Q^T x is differentiated, through x. Both ways are
calls of `attend` between a grid and a coarser one (`Around`, `Within`); Q^T is the pass with queries and keys
exchanged (`collect`). At the border of the map, neighbours outside are zero vectors with logit 0, as
published: they take a share of Q that comes back as nothing. `border="mask"` leaves them out.
Where cells do not divide the map, the last ones are smaller; the authors pad the map with zero tokens that
are averaged, associated and clustered like others: `official=True`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.collect import collect
from foveate.mechanisms.inputs import check_tokens, frozen, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.coarse import Around, Within
from foveate.routing.regions import Regions


class Association(NamedTuple):
    """The soft assignment Q of tokens to super tokens, as what `attend` needs to apply it.

    Attributes:
        tokens: (B, 1, N, C), the queries.
        centres: (B, 1, M, C), the keys.
        lse: (B, 1, N), the logarithm of each token's row sum, in float32 or better.
        around: where tokens look.
        backend: of `attend`.
    """

    tokens: Float[Tensor, "b 1 n c"]
    centres: Float[Tensor, "b 1 m c"]
    lse: Float[Tensor, "b 1 n"]
    around: Around
    backend: str

    @classmethod
    def of(
        cls, tokens: Float[Tensor, "b n c"], centres: Float[Tensor, "b m c"], around: Around, backend: str
    ) -> "Association":
        """Associate tokens with the centres around their cells."""
        q, k = tokens[:, None], centres[:, None]
        # Only the row sums are wanted, and rows of values may be as thin as they can be.
        _, lse = attend(q, k, k[..., :1], where=around, return_lse=True, backend=backend)
        return cls(q, k, lse, around, backend)

    def gather(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b m e"]:
        """Return Q^T x."""
        where = Within(self.around.grid, self.around.cell, self.around.reach)
        out = collect(self.tokens, self.centres, x[:, None], self.lse, where=where, backend=self.backend)
        return out[:, 0]

    def spread(self, s: Float[Tensor, "b m e"]) -> Float[Tensor, "b n e"]:
        """Return Q s."""
        return attend(self.tokens, self.centres, s[:, None], where=self.around, backend=self.backend)[:, 0]


@system(
    key="super_token_attention",
    title="Vision Transformer with Super Token Sampling",
    arxiv="2211.11167",
    year=2023,
    family="routed",
    role="module",
    cost="O(9 N C + M^2 C), M super tokens",
    fidelity="vectors",
    limits="The association gets no gradient, as published; with cells of one token this is full attention.",
)
class SuperTokenAttention(nn.Module):
    """Attention among super tokens, between two soft associations.

    Args:
        dim: channels C.
        heads: number of heads of the attention among super tokens; must divide `dim`.
        cell: tokens of a super token's cell, one integer or one per axis; 1 makes it full attention.
        iterations: how often tokens are associated and super tokens moved, >= 1.
        qkv_bias: whether the q, k, v projections have a bias.
        border: "zero" or "mask": what neighbours outside the map are (see above).
        official: pad maps that cells do not divide, as the authors do.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        cell: int | Sequence[int] = 8,
        iterations: int = 1,
        qkv_bias: bool = True,
        border: Literal["zero", "mask"] = "zero",
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise bad("iterations", iterations, "a positive integer")
        if border not in ("zero", "mask"):
            raise bad("border", border, "'zero' or 'mask'")
        self.cell = frozen(cell)
        if any(size < 1 for size in ((self.cell,) if isinstance(self.cell, int) else self.cell)):
            raise bad("cell", cell, "positive integers")
        self.dim, self.heads, self.iterations, self.backend = dim, heads, iterations, backend
        self.border: Literal["zero", "mask"] = border
        self.official = official
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "SuperTokenAttention":
        """Return about 7 super tokens per axis, as in the first stages of the paper, of 2 tokens or more.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "super tokens are made of later tokens too")
        return cls(dim=dim, heads=heads, cell=tuple(-(-size // 7) for size in grid))

    def refine(self, s: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """Attend among super tokens."""
        return self.proj(merge_heads(attend(*self.qkv(s), backend=self.backend)))

    @torch.no_grad()
    def associate(self, x: Float[Tensor, "b n c"], grid: Grid) -> Association:
        """Return the last association of the tokens of `grid`; no gradient."""
        x, cell = x.detach(), grid.per_axis(self.cell, "cell")  # a view of x would require a gradient again
        around = Around(grid, cell, 1, self.border)
        centres = Regions(grid, cell).pool(x)
        for _ in range(self.iterations - 1):
            centres = _means(Association.of(x, centres, around, self.backend), x)
        return Association.of(x, centres, around, self.backend)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x`, `grid` or `cell`.
        """
        check_tokens(x, grid, self.dim)
        cell = grid.per_axis(self.cell, "cell")
        if all(size == 1 for size in cell):
            return self.refine(x)
        inside, whole = grid, Regions(grid, cell).whole().grid
        if self.official and whole != grid:
            x, grid = _pad(x, grid, whole), whole
        association = self.associate(x, grid)
        out = association.spread(self.refine(_means(association, x)))
        return out if grid == inside else _crop(out, grid, inside)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, cell={self.cell}, iterations={self.iterations}"


def _means(association: Association, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
    """Return the mean of the tokens of each super token, weighted by the association."""
    sums = association.gather(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))
    return sums[..., :-1] / (sums[..., -1:].detach() + 1e-12)


class ResidualConv(nn.Module):
    """x + depthwise 3x3 convolution of the map x (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Add the convolution."""
        return x + self.conv(x)


class SuperTokenLayer(nn.Module):
    """Convolutional position encoding, super token attention and a convolutional MLP, each with a residual.

    The MLP stands behind a batch norm, so that samples of a training batch are coupled.

    Args:
        dim, heads, cell, iterations, qkv_bias, border, official, backend: as in `SuperTokenAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
        layer_scale: initial value of learned factors on the two residual branches, None for none.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        cell: int | Sequence[int] = 8,
        iterations: int = 1,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        border: Literal["zero", "mask"] = "zero",
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.pos_embed = ResidualConv(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SuperTokenAttention(
            dim=dim,
            heads=heads,
            cell=cell,
            iterations=iterations,
            qkv_bias=qkv_bias,
            border=border,
            official=official,
            backend=backend,
        )
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1), nn.GELU(), ResidualConv(hidden), nn.Conv2d(hidden, dim, 1)
        )
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            for _ in range(2)
        )

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the layer to the tokens of a 2-d `grid`."""
        check_tokens(x, grid, self.attn.dim, (2,))
        x = _tokens(self.pos_embed(_map(x, grid)))
        x = x + _scaled(self.attn(self.norm1(x), grid), self.gamma1)
        return x + _scaled(_tokens(self.mlp(self.norm2(_map(x, grid)))), self.gamma2)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def _map(x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b c *spatial"]:
    return x.transpose(1, 2).unflatten(2, grid.sizes)


def _tokens(x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b n c"]:
    return x.flatten(2).transpose(1, 2)


def _pad(x: Float[Tensor, "b n c"], grid: Grid, whole: Grid) -> Float[Tensor, "b m c"]:
    """Put zero tokens behind the last ones of every axis."""
    sides = [(0, w - n) for n, w in zip(grid, whole, strict=True)]
    flat = [side for pair in reversed(sides) for side in pair]
    return functional.pad(x.unflatten(1, grid.sizes), (0, 0, *flat)).flatten(1, grid.ndim)


def _crop(x: Float[Tensor, "b m c"], whole: Grid, grid: Grid) -> Float[Tensor, "b n c"]:
    """Undo `_pad`."""
    kept = tuple(slice(n) for n in grid)
    return x.unflatten(1, whole.sizes)[(slice(None), *kept)].flatten(1, grid.ndim)
