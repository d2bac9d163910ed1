"""PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation. arXiv 2512.04025, 2025.

Training-free attention in blocks that is neither all nor nothing: every (query block, key block) pair gets a level.
Level 1 sees the keys as they are, level p sees them averaged by p, level 0 does not see them. A pooled key counts
for p tokens, by ln p added to its logits. Levels follow the importance of a block, estimated from a quarter of the
tokens; optionally a block is pooled no further than its keys are alike.

    importance[a, b] = max_{i in a, j in b} exp(s_ij - max_j' s_ij'),  s = q k^T / sqrt(d) over sampled tokens
    level[a, b]      = by rank (`mode="rank"`) or cumulated importance (`"mass"`) in the row a      (B, H, N/m, N/n)
    out_i            = softmax_{p, r in level p}(q_i . kbar^p_r / sqrt(d) + ln p) vbar^p_r,   kbar^p (B, H, N/p, D)

A group of fewer than p tokens at the end counts for what it has. The authors fill it up with copies of the last
token, all of which count: `official=True`. Sampled places are spread evenly unless a generator draws them, as the
authors do. With `masked=True` a key is seen from its last token on, shares count the blocks that are visible, and the
first block and those at the query's own place have level 1, as in the authors' language models (which estimate
importance in another way); this is not causal, as all queries of a block choose together.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.core.tracing import run_eagerly
from foveate.kernels.banks import Bank, attend_banks
from foveate.mechanisms.inputs import check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.routing.blocks import (
    block_count,
    block_sizes,
    causal_blocks,
    pool_blocks,
    rank_levels,
    select_blocks,
)
from foveate.routing.levels import (
    alignment,
    check_levels,
    keep_last,
    listed_blocks,
    mass_ends,
    rank_ends,
    sample_offsets,
    sampled_importance,
    similar_levels,
)

# Cumulated shares of the blocks, as published: a twentieth whole, a half not seen at all.
SHARES = {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5}
Mode = Literal["rank", "mass"]


def level_ends(
    scores: Float[Tensor, "b h q_blocks k_blocks"],
    shares: Mapping[int, float],
    *,
    mode: Mode = "rank",
    align: Mapping[int, int] | None = None,
    visible: Int[Tensor, "q_blocks"] | None = None,
) -> Int[Tensor, "*rows levels"]:
    """Return up to which rank in its row a block has each level; `rank_levels` gives blocks their levels.

    Args:
        scores: importance of the blocks.
        shares: level -> cumulated share, ascending: of the blocks, or of their importance.
        mode: "rank" or "mass".
        align: level -> multiple of blocks an interval is rounded to.
        visible: how many blocks of each row shares of blocks are taken of; all where it is None.
    """
    if mode == "mass":
        return mass_ends(scores, shares, align)
    counts = [scores.shape[-1]] if visible is None else visible.tolist()
    return torch.tensor([rank_ends(n, shares, align) for n in counts], device=scores.device)


def pyramid_banks(
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    levels: Int[Tensor, "b h q_blocks k_blocks"],
    *,
    n_q: int,
    blocks: tuple[int, int],
    masked: bool = False,
    official: bool = False,
) -> list[Bank]:
    """Return one bank per level: pooled keys and values, the blocks that see them, ln p.

    Args:
        k, v: keys and values.
        levels: level of each block.
        n_q: number of queries.
        blocks: queries and keys of a block.
        masked: hide keys whose last token comes after the query.
        official: fill short groups up with copies of the last token.

    Raises:
        ArgumentError: naming `block` when a level does not divide it.
    """
    n, banks = k.shape[2], []
    present = [p for p in torch.unique(levels).tolist() if p]
    check_levels(dict.fromkeys(present, 0.0), blocks[1])
    filled = torch.arange(block_count(n, blocks[1]) * blocks[1], device=k.device).clamp(max=n - 1)
    q_at = torch.arange(n - n_q, n, device=k.device)
    for p in present:
        pad = official and p > 1
        keys, values = (pool_blocks(x[:, :, filled] if pad else x, p) if p > 1 else x for x in (k, v))
        count = torch.full_like(filled[::p], p) if pad else block_sizes(n, p, k.device)
        # Copies have a place too, after the last token, where no query stands.
        k_at = (torch.arange(len(count), device=k.device) + 1) * p - 1
        k_at = k_at if pad else k_at.clamp(max=n - 1)
        at, size = (q_at, k_at), blocks[1] // p
        seen = listed_blocks(levels == p)
        where = select_blocks(seen, blocks[0], size, n_q, len(count), causal=masked, positions=at)
        bias = count.to(accumulation_dtype(k.dtype)).log() if p > 1 else None
        banks.append(Bank(keys, values, where, bias))
    return banks or [Bank(k[:, :, :0], v[:, :, :0])]


@run_eagerly
def pyramid_attention(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b hk n_k d"],
    v: Float[Tensor, "b hk n_k dv"],
    levels: Int[Tensor, "b h q_blocks k_blocks"],
    *,
    blocks: tuple[int, int],
    masked: bool = False,
    official: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q dv"]:
    """Attend to the blocks at their levels, one softmax over all. Arguments as in `pyramid_banks` and `attend`."""
    banks = pyramid_banks(k, v, levels, n_q=q.shape[2], blocks=blocks, masked=masked, official=official)
    return attend_banks(q, banks, scale=scale, backend=backend)


@system(
    key="pyramid_sparse_attention",
    title="PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
    arxiv="2512.04025",
    year=2025,
    family="routed",
    role="router",
    cost="O(N^2 C / 16) to choose, O(density N^2 C) to attend",
    fidelity="vectors",
    limits="No re-ordering of video tokens and no dense warm-up steps; the choice of levels gets no gradient.",
)
class PyramidSparseAttention(nn.Module):
    """Multi-head attention to key blocks at the level each is worth.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        block: queries and keys of a block: one integer or two.
        shares: level -> cumulated share of blocks ("rank") or of importance ("mass"), ascending; the rest is not
            seen. Levels divide the key block.
        mode: "rank" or "mass", how levels follow importance.
        text: number of tokens at the end whose blocks always have level 1.
        similar: level -> cosine above which keys are alike enough to be pooled that far; None does not ask.
        masked: whether a token sees only keys up to its own place.
        tile: keys of a tile that pooled blocks should fill: intervals of a level are rounded to it. None does not.
        official: let copies that fill up the last group count, as the authors do.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        block: int | tuple[int, int] = 32,
        shares: Mapping[int, float] | None = None,
        mode: Mode = "rank",
        text: int = 0,
        similar: Mapping[int, float] | None = None,
        masked: bool = False,
        tile: int | None = None,
        official: bool = False,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        self.shares = dict(SHARES if shares is None else shares)
        sizes = (block, block) if isinstance(block, int) else tuple(block)
        if len(sizes) != 2 or min(sizes) < 1:
            raise bad("block", block, "a positive number of tokens, or one for queries and one for keys")
        self.blocks = (sizes[0], sizes[1])
        ends = list(self.shares.values())
        if not ends or ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= 1:
            raise bad(
                "shares", self.shares, "ascending shares between 0 and 1, cumulated from level to level"
            )
        if mode not in ("rank", "mass"):
            raise bad("mode", mode, "'rank' or 'mass'")
        if text < 0:
            raise bad("text", text, "a number of tokens >= 0")
        check_levels({**self.shares, **(similar or {})}, self.blocks[1])
        self.dim, self.heads, self.text, self.masked = dim, heads, text, masked
        self.mode: Mode = mode
        self.similar = None if similar is None else dict(similar)
        self.tile, self.official, self.backend = tile, official, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "PyramidSparseAttention":
        """Return the published shares where a twentieth of the blocks is a block, wider ones on fewer tokens.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "the queries of a block choose the levels together, later ones too")
        block = next((b for b in (8, 16) if grid.numel <= 32 * b), 32)
        few = grid.numel < 20 * block
        return cls(
            dim=dim, heads=heads, block=block, shares={1: 0.25, 2: 0.5, 4: 0.75, 8: 1.0} if few else None
        )

    @torch.no_grad()
    def route(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk n d"],
        *,
        generator: torch.Generator | None = None,
        draws: tuple[Int[Tensor, "#b #h s"], Int[Tensor, "#b #hk t"]] | None = None,
    ) -> Int[Tensor, "b h q_blocks k_blocks"]:
        """Return the level of each block.

        Args:
            q, k: per head.
            generator: draws the places of a block that are sampled, per batch element and head.
            draws: the places themselves, of query and of key blocks, instead.
        """
        past = visible = None
        if self.masked:
            past = causal_blocks(q.shape[2], k.shape[2], *self.blocks, device=q.device)
            visible = past.sum(1)
        if draws is None:
            sizes = zip(self.blocks, (q, k), strict=True)
            draws = tuple(  # type: ignore[assignment]
                sample_offsets(size, max(size // 4, 1), (x.shape[0], x.shape[1]), generator=generator)
                for size, x in sizes
            )
        assert draws is not None
        scores = sampled_importance(
            q, k, *self.blocks, q_offsets=draws[0], k_offsets=draws[1], causal=self.masked
        )
        align = None if self.tile is None else alignment(self.shares, self.blocks[1], self.tile)
        ends = level_ends(scores, self.shares, mode=self.mode, align=align, visible=visible)
        levels = keep_last(rank_levels(scores, ends, list(self.shares)), self.text, self.blocks[1])
        if self.similar is not None:
            alike = similar_levels(k, self.blocks[1], self.similar)
            share = q.shape[1] // k.shape[1]
            levels = torch.minimum(levels, alike.repeat_interleave(share, dim=1)[:, :, None, :])
        if past is not None:
            whole = causal_blocks(q.shape[2], k.shape[2], *self.blocks, whole=True, device=q.device)
            whole[:, :1] = False  # where sinks are
            levels = levels.masked_fill(~past, 0).masked_fill(past & ~whole, 1)
        return levels

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        *,
        generator: torch.Generator | None = None,
        draws: tuple[Int[Tensor, "#b #h s"], Int[Tensor, "#b #hk t"]] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens, blocks along the flattened order; `generator` and `draws` as in `route`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        levels = self.route(q, k, generator=generator, draws=draws)
        out = pyramid_attention(
            q, k, v, levels, blocks=self.blocks, masked=self.masked, official=self.official, backend=self.backend
        )  # fmt: skip
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, block={self.blocks}, shares={self.shares}, mode={self.mode!r}"
