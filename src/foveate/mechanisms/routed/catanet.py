"""CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution.
arXiv 2503.06896, 2025.

Tokens are clustered by token centres that all images share: a buffer that follows the training batches and
stands still in evaluation. Tokens sorted by their centre are cut into groups of equal size, and each group
attends to itself and to the next one; every token also attends to the centres. The two are added.

    a_i = argmax_m cos(z_i, mu_m)                                    (B, N), mu (M, C); no gradient
    groups = consecutive g tokens of the stable order of a
    out = softmax(q k[own, next]^T / sqrt(D)) v[own, next] + softmax(q k_mu^T / sqrt(D)) v_mu
    q, k, v = z W;  k_mu, v_mu = mu W'                               queries and keys of a width of their own

In training mu is first refined on the batch by some steps of spherical k-means, the last of which carries
gradients, and the buffer follows by a moving average. The window of keys at the end of the order is moved
inside, so that every group sees 2 g different tokens. The authors reflect the order there, and tokens seen
twice count twice: `official=True`. It also clusters an evaluation batch from scratch when no training step
has been made yet; by default the centres are random directions then.

Tokens of one centre stay in the order of the map; theirs is what an unstable sort makes of it.

The second half of a layer is attention in overlapping patches (`PatchBlock`). Where patches overlap the
default is the mean; the authors halve each overlap of two neighbouring patches along rows and columns, which
is the mean except where three patches meet because the last one was moved inside: `official=True`.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.overlap import overlap_starts, overlapping
from foveate.patterns.schedule import Mean
from foveate.routing.centres import SharedCentres, nearest
from foveate.routing.sorted_groups import sorted_groups


@system(
    key="catanet",
    title="CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
    arxiv="2503.06896",
    year=2025,
    family="routed",
    role="router",
    cost="O(N 2g C + N M C), groups of g tokens, M centres",
    fidelity="vectors",
    limits="Centres learn in training mode only, from the whole batch; the assignment gets no gradient.",
)
class TokenAggregation(nn.Module):
    """Attention inside groups of similar tokens, and to the centres of all clusters.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim` and `qk_dim`.
        qk_dim: channels of queries and keys over all heads, `dim` by default.
        clusters: number of centres M.
        group: tokens of a group g.
        iterations: steps of k-means on a training batch.
        decay: of the moving average of the centres.
        official: the authors' reflection at the end of the order, and their first centres (see above).
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        qk_dim: int | None = None,
        clusters: int = 16,
        group: int = 256,
        iterations: int = 5,
        decay: float = 0.999,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        qk_dim = dim if qk_dim is None else qk_dim
        if qk_dim < 1 or qk_dim % heads:
            raise bad("qk_dim", qk_dim, f"a positive multiple of heads={heads}")
        if clusters < 1:
            raise bad("clusters", clusters, "a positive number of centres")
        if group < 1:
            raise bad("group", group, "a positive number of tokens")
        self.dim, self.heads, self.group, self.official, self.backend = dim, heads, group, official, backend
        self.centres = SharedCentres(clusters, dim, iterations=iterations, decay=decay, official=official)
        self.to_q = nn.Linear(dim, qk_dim, bias=False)
        self.to_k = nn.Linear(dim, qk_dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.centre_k = nn.Linear(dim, qk_dim, bias=False)
        self.centre_v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "TokenAggregation":
        """Return groups of about sqrt(N) tokens (at least 16) and 16 centres, fewer for few tokens.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "tokens are sorted by content, later ones among earlier ones")
        n = grid.numel
        return cls(dim=dim, heads=heads, clusters=min(16, max(1, n // 4)), group=max(16, round(n**0.5)))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`; in training mode, move the centres.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        return self.forward_sorted(x, grid)[0]

    def forward_sorted(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, order: Int[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Int[Tensor, "b n"]]:
        """Return the output and the order of the tokens.

        Args:
            x: tokens.
            grid: their geometry.
            order: one of the orders that sort the tokens by centre, to say what is done with ties.

        Raises:
            ArgumentError: naming `order`, when it does not sort the tokens by centre.
        """
        check_tokens(x, grid, self.dim)
        centres = self.centres(x)
        ids = nearest(x, centres)
        if order is None:
            order = ids.argsort(dim=-1, stable=not self.official)
        else:
            _check_order(order, ids)
        q, k, v = (split_heads(part(x), self.heads) for part in (self.to_q, self.to_k, self.to_v))
        where = sorted_groups(order, self.group, reflect=self.official)
        near = attend(q, k, v, where=where, backend=self.backend)
        k, v = (split_heads(part(centres[None]), self.heads) for part in (self.centre_k, self.centre_v))
        out = self.proj(merge_heads(near + attend(q, k, v, backend=self.backend)))
        if self.training:
            self.centres.follow(centres)
        return out, order

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, group={self.group}, official={self.official}"


def _check_order(order: Tensor, ids: Int[Tensor, "b n"]) -> None:
    """Raise unless every row of `order` holds all tokens, sorted by their centre `ids`."""
    every = torch.arange(ids.shape[1], device=ids.device)
    if order.shape != ids.shape or not (order.sort(dim=-1).values == every).all():
        raise bad("order", tuple(order.shape), f"every token once, in a tensor {tuple(ids.shape)}")
    if (ids.gather(1, order).diff(dim=-1) < 0).any():
        raise bad("order", "ids", "tokens sorted by their nearest centre")


class ConvFFN(nn.Module):
    """MLP with a depthwise 5x5 convolution beside its hidden layer: W2 (h + GELU(conv(h))), h = GELU(W1 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply it to the tokens of a 2-d grid."""
        hidden = functional.gelu(self.fc1(x))
        spatial = self.conv(hidden.transpose(1, 2).unflatten(2, grid.sizes))
        return self.fc2(hidden + functional.gelu(spatial.flatten(2).transpose(1, 2)))


class TokenAggregationBlock(nn.Module):
    """Token aggregation and a convolutional MLP, each on normed tokens with a residual.

    Args:
        dim: channels C.
        heads: number of heads.
        mlp_dim: hidden width of the MLP.
        options: the other options of `TokenAggregation`.
    """

    def __init__(self, *, dim: int, heads: int, mlp_dim: int, **options: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAggregation(dim=dim, heads=heads, **options)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ConvFFN(dim, mlp_dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of a 2-d grid."""
        return self.forward_sorted(x, grid)[0]

    def forward_sorted(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, order: Int[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Int[Tensor, "b n"]]:
        """Return the output and the order of the tokens, which may be given as in `TokenAggregation`."""
        check_tokens(x, grid, self.attn.dim, (2,))
        out, order = self.attn.forward_sorted(self.norm1(x), grid, order=order)
        x = x + self.mix(out)
        return x + self.ffn(self.norm2(x), grid), order


class PatchBlock(nn.Module):
    """Attention inside overlapping patches, averaged, and a convolutional MLP, each with a residual.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim` and `qk_dim`.
        mlp_dim: hidden width of the MLP.
        qk_dim: channels of queries and keys over all heads, `dim` by default.
        patch: side of a patch, at least 3; smaller maps are one patch. Patches are `patch - 2` apart.
        official: halve overlaps one after the other in place of the mean.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mlp_dim: int,
        qk_dim: int | None = None,
        patch: int = 16,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        qk_dim = dim if qk_dim is None else qk_dim
        if qk_dim < 1 or qk_dim % heads:
            raise bad("qk_dim", qk_dim, f"a positive multiple of heads={heads}")
        if patch < 3:
            raise bad("patch", patch, "a side of at least 3", "Neighbouring patches share 2 rows.")
        self.dim, self.heads, self.patch, self.official, self.backend = dim, heads, patch, official, backend
        self.norm1 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, qk_dim, bias=False)
        self.to_k = nn.Linear(dim, qk_dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ConvFFN(dim, mlp_dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of a 2-d grid.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        z = self.norm1(x)
        q, k, v = (split_heads(part(z), self.heads) for part in (self.to_q, self.to_k, self.to_v))
        size = tuple(min(self.patch, length) for length in grid)
        stride = tuple(min(self.patch - 2, s) for s in size)
        where = overlapping(grid, size, stride, "sum" if self.official else Mean())
        out = self.proj(merge_heads(attend(q, k, v, where=where, backend=self.backend)))
        if self.official:
            # Residuals are cut and averaged with the patches, so that three halves of a half shrink them too.
            share, count = halved(grid, size, stride)
            share, count = share.to(x), count.to(x)
            x = x * (share * count)[:, None] + out * share[:, None]
        else:
            x = x + out
        return x + self.ffn(self.norm2(x), grid)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, patch={self.patch}, official={self.official}"


def halved(
    grid: Grid, size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Return each token's factor when overlaps of consecutive patches are halved, and its number of patches."""
    share, count = torch.ones(1), torch.ones(1)
    for length, s, step in zip(grid, size, stride, strict=True):
        starts = overlap_starts(length, s, step)
        factor, patches = torch.ones(length), torch.zeros(length)
        for start in starts:
            patches[start : start + s] += 1
        for before, start in pairwise(starts):
            factor[start : before + s] /= 2
        share = (share[:, None] * factor).flatten()
        count = (count[:, None] * patches).flatten()
    return share, count
