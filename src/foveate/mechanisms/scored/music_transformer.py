"""Music Transformer: Generating Music with Long-Term Structure. arXiv 1809.04281, 2018.

Relative attention for long sequences: besides looking at what a key is, a query looks at how far it is, through a
learned vector per head and distance. Products with all vectors are formed first, N x M of them, and then moved where
they belong ("skewing"), so that the vectors never spread over pairs of tokens: memory falls from O(N^2 D) to O(N M).
Distances beyond the table add nothing.

    L = (q k^T + skew(q E^T)) / sqrt(D),  skew(R)[i, j] = R[i, M - 1 - (i - j)], 0 where i - j >= M     (B, H, N, N)
    out = softmax(L) v                                    E (H, M, D), its last row for distance 0; or (M, D) for all

Without a causal mask the table has 2 M - 1 rows, for keys on both sides. The block-local version cuts the sequence in
blocks and lets a token see its own block, up to itself, and the one before. Optionally the weights, summed by distance,
also read a second table that is added to the output ("relative embeddings of values", which the paper does not use).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import apply, attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.basic import Causal
from foveate.patterns.offsets import Spans
from foveate.patterns.pattern import check_int
from foveate.scores.skew import RelativeLogits, relative_values


def relative_attention(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    table: Float[Tensor, "*h m d"],
    value_table: Float[Tensor, "*h m e"] | None = None,
    *,
    causal: bool = True,
    block: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    official: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend by content and distance; the queries stand at the end of the keys.

    Args:
        q, k, v: as in `attend`.
        table: one vector per distance, for each head or for all. Causal: distances M - 1, ..., 0. Otherwise an odd
            number of rows, for offsets (key - query) -(M - 1), ..., M - 1.
        value_table: the same for values; attention weights are then stored.
        causal: whether keys after the query are hidden.
        block: tokens of a block; a query sees its own block and the one before. None sees all.
        mask: as in `attend`.
        scale: of both terms, D**-0.5 by default.
        official: leave `value_table` out of the first block, as the authors' code does (of everything, where there
            are fewer than two blocks).
        backend: of `attend`.

    Raises:
        ArgumentError: naming `table`, `value_table`, `block` or what does not fit.
    """
    heads, rows = q.shape[1], table.shape[-2]
    for name, given in (("table", table), ("value_table", value_table)):
        if given is not None and (given.shape[:-2] not in ((), (heads,)) or given.shape[-2] != rows):
            raise bad(name, tuple(given.shape), f"({heads}, {rows}, width), or ({rows}, width) for all heads")
    if not causal and rows % 2 == 0:
        raise bad("table", tuple(table.shape), "an odd number of rows", "Offsets -(M-1)..M-1 take 2 M - 1.")
    if block is not None and not causal:
        raise bad("block", block, "None where causal is False", "Blocks look back only.")
    first = 1 - rows if causal else -(rows // 2)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    n, n_k, dropped, where = q.shape[2], k.shape[2], 0, Causal() if causal else None
    if block is not None:
        q, k, v, mask, where = _blocks(q, k, v, mask, block)
        dropped = q.shape[2] - n
    score = RelativeLogits(factor * (q @ table.mT), first)
    options = {"where": where, "score": score, "mask": mask, "scale": factor, "backend": backend}
    if value_table is None:
        return attend(q, k, v, **options)[:, :, dropped:]
    eye = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(v.shape[0], k.shape[1], -1, -1)
    weights = attend(q, k, eye, **options)
    extra = relative_values(weights, value_table, first=first)
    if official and block is not None:
        # Positions below this one go without; row 0 stands at n_k - q.shape[2].
        limit = n_k if n_k < 2 * block else block
        bare = min(max(limit - (n_k - q.shape[2]), 0), q.shape[2])
        extra = F.pad(extra[:, :, bare:], (0, 0, bare, 0))
    return (apply(weights, v) + extra)[:, :, dropped:].to(v.dtype)


def _blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block: int) -> tuple:
    """Return what queries at the end of the keys can see, cut at the start of a block, and who sees whom."""
    check_int(block, "block", 1)
    n_q, n_k = q.shape[2], k.shape[2]
    start = n_k - n_q
    cut = max(start // block - 1, 0) * block
    k, v = k[:, :, cut:], v[:, :, cut:]
    mask = mask[..., cut:] if mask is not None and mask.shape[-1] > 1 else mask
    if start // block == (n_k - 1) // block:
        return q, k, v, mask, Causal()  # one block: it sees all that is left
    # Blocks are counted for queries and keys alike, so that queries have to start where the keys do.
    missing = start - cut
    if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
        mask = F.pad(mask, (0, 0, missing, 0))
    return F.pad(q, (0, 0, missing, 0)), k, v, mask, Causal() & Spans(block, block, -1, 0)


@system(
    key="music_transformer",
    title="Music Transformer: Generating Music with Long-Term Structure",
    arxiv="1809.04281",
    year=2018,
    family="scored",
    role="score",
    cost="O(N^2 C)",
    fidelity="vectors",
    causal="optional",
    dims=(1,),
    limits="Distances beyond max_distance look all alike; value_table stores the N x N weights.",
)
class RelativeGlobalAttention(Decodes, nn.Module):
    """Relative attention with projections.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        max_distance: M, distances with a vector of their own: 0 to M - 1. The authors take half the training length.
        causal: whether a token sees only itself and what comes before.
        block: tokens of a block in the local version; None sees all.
        share: one table for all heads.
        relative_values: add embeddings of distances on the value side too.
        bias: whether the projections have one.
        official: leave the value side out of the first block, as the authors' code does.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        max_distance: int = 1024,
        causal: bool = True,
        block: int | None = None,
        share: bool = False,
        relative_values: bool = False,
        bias: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        check_int(max_distance, "max_distance", 1)
        if block is not None:
            check_int(block, "block", 1)
            if not causal:
                raise bad("block", block, "None where causal is False", "Blocks look back only.")
        self.dim, self.heads, self.max_distance, self.causal = dim, heads, max_distance, causal
        self.block, self.share, self.official, self.backend = block, share, official, backend
        self.qkv = QKV(dim, heads, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        rows = max_distance if causal else 2 * max_distance - 1
        shape = (rows, width) if share else (heads, rows, width)
        self.table = nn.Parameter(torch.empty(shape))
        self.value_table = nn.Parameter(torch.empty(shape)) if relative_values else None
        self.reset_parameters()

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "RelativeGlobalAttention":
        """Return a layer that tells half of the distances of the sequence apart, as the authors do.

        Raises:
            ArgumentError: naming `grid` when it is not a sequence.
        """
        if grid.ndim != 1:
            raise bad("grid", grid, "a grid with 1 axis", "Distances are counted along a sequence.")
        return cls(dim=dim, heads=heads, max_distance=max(grid.numel // 2, 1), causal=causal)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the tables from a normal distribution with standard deviation D**-0.5, as published."""
        for table in (self.table, self.value_table):
            if table is not None:
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, mask: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a sequence.

        Args:
            x: tokens.
            grid: their geometry, one axis.
            mask: as in `attend`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (1,))
        q, k, v = self.qkv(x)
        return self._mix(q, k, v, mask)

    def prefill(
        self, x: Float[Tensor, "b n c"], past: Past | None = None
    ) -> tuple[Float[Tensor, "b n c"], Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Raises:
            ArgumentError: naming `past`, or `causal` where later tokens would be needed.
        """
        if not self.causal:
            raise bad("causal", self.causal, "True to decode", "Earlier tokens would see the new one.")
        q, k, v = self.qkv(x)
        past = extend(past, Past(k, v))
        return self._mix(q, past.k, past.v, None), past

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = relative_attention(
            q,
            k,
            v,
            self.table,
            self.value_table,
            causal=self.causal,
            block=self.block,
            mask=mask,
            official=self.official,
            backend=self.backend,
        )
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, max_distance={self.max_distance}, causal={self.causal}, "
            f"block={self.block}, share={self.share}, relative_values={self.value_table is not None}"
        )
