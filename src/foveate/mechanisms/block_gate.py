"""`BlockGate`: a learned guess, from pooled queries and keys, of how much attention every block will get.

Beside it the truth it learns from, its loss, and the choice of blocks by its logits.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.routing.blocks import Pooling, choose_above, choose_top, pool_blocks
from foveate.routing.counted import choose_count
from foveate.routing.truth import block_weights
from foveate.scores.rotary import rotary, rotate

# Cosines and sines at block positions, (B, blocks, D_g) with every angle twice, as language models make them.
Turn = tuple[Tensor, Tensor]


def poolings_of(name: str) -> tuple[tuple[Pooling, ...], tuple[Pooling, ...]]:
    """Read a name like "Qavg_Kmaxminavg": how queries and how keys are pooled, in this order.

    Raises:
        ArgumentError: naming `pooling`.
    """
    names: tuple[Pooling, ...] = ("max", "min", "avg")
    some = "((?:max|min|avg)+)"
    found = re.fullmatch(f"Q{some}_K{some}", name) if isinstance(name, str) else None
    sides: list[tuple[Pooling, ...]] = []
    for side in found.groups() if found else ():
        sides.append(tuple(sorted((n for n in names if n in side), key=side.index)))
    if not found or any(
        len("".join(side)) != len(text) for side, text in zip(sides, found.groups(), strict=True)
    ):
        hint = "After Q and after K stand some of max, min and avg, each once."
        raise bad("pooling", name, "a name like 'Qavg_Kmaxminavg'", hint)
    return sides[0], sides[1]


class BlockGate(nn.Module):
    """Logits of blocks of keys for blocks of queries.

        q_g = rope(concat_p(pool_p(q)) W_q)    (B, H, q_blocks, D_g), a W per head
        k_g = rope(concat_p(pool_p(k)) W_k)    (B, H_kv, k_blocks, D_g)
        logits = q_g k_g^T / sqrt(D_g)         (B, H, q_blocks, k_blocks)

    Rope stands at each block's first position. Queries pooled in one way into the width they have need no map of
    their own: then there is no W_q, and W_k has H heads.

    Args:
        heads: query heads H.
        width: channels D of a head.
        kv_heads: key heads H_kv, as many as queries by default.
        gate_dim: D_g, D by default; even.
        block: tokens per block.
        pooling: how blocks are pooled: "Q", some of max, min and avg, "_K", some of them.
        double: keep W_q also where it is not needed.
        base: of the rotary embedding.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        heads: int,
        width: int,
        kv_heads: int | None = None,
        gate_dim: int | None = None,
        block: int = 64,
        pooling: str = "Qavg_Kmaxminavg",
        double: bool = False,
        base: float = 10000.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        gate_dim = width if gate_dim is None else gate_dim
        if kv_heads < 1 or heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        if gate_dim < 2 or gate_dim % 2:
            raise bad("gate_dim", gate_dim, "an even number of channels", "Rotary positions turn pairs.")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise bad("block", block, "a positive integer")
        self.heads, self.kv_heads, self.width, self.gate_dim = heads, kv_heads, width, gate_dim
        self.block, self.pooling, self.base = block, pooling, base
        self.query_pools, self.key_pools = poolings_of(pooling)
        both = double or len(self.query_pools) > 1 or gate_dim != width
        self.q_weight = (
            nn.Parameter(torch.empty(heads, width * len(self.query_pools), gate_dim)) if both else None
        )
        self.k_weight = nn.Parameter(
            torch.empty(kv_heads if both else heads, width * len(self.key_pools), gate_dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps so that the pooled size is kept (Glorot, per head)."""
        for weight in (self.q_weight, self.k_weight):
            if weight is not None:
                limit = (6 / (weight.shape[1] + weight.shape[2])) ** 0.5
                nn.init.uniform_(weight, -limit, limit)

    def queries(
        self,
        q: Float[Tensor, "b h n d"],
        *,
        block: int | None = None,
        start: int = 0,
        turn: Turn | None = None,
    ) -> Float[Tensor, "b h q_blocks d_g"]:
        """Return what stands for blocks of queries.

        Args:
            q: queries before any rotation.
            block: queries per block, the gate's own by default; 1 is every query for itself.
            start: position of the first one.
            turn: cosines and sines instead of the gate's own.
        """
        block = self.block if block is None else block
        x = torch.cat([q if block == 1 else pool_blocks(q, block, how) for how in self.query_pools], -1)
        return self._turned(x if self.q_weight is None else x @ self.q_weight, block, start, turn)

    def keys(
        self, k: Float[Tensor, "b h_kv n d"], *, start: int = 0, turn: Turn | None = None
    ) -> Float[Tensor, "b h_g k_blocks d_g"]:
        """Return what stands for blocks of keys; worth caching, as a whole block's never changes.

        Args:
            k: keys before any rotation, H_kv heads.
            start: position of the first one, where a block begins.
            turn: cosines and sines instead of the gate's own.
        """
        x = torch.cat([pool_blocks(k, self.block, how) for how in self.key_pools], -1)
        if self.k_weight.shape[0] > x.shape[1]:
            x = x.repeat_interleave(self.heads // self.kv_heads, 1)
        return self._turned(x @ self.k_weight, self.block, start, turn)

    def logits(
        self,
        queries: Float[Tensor, "b h q_blocks d_g"],
        keys: Float[Tensor, "b h_g k_blocks d_g"],
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "b h q_blocks k_blocks"]:
        """Return the logits of blocks.

        Args:
            queries, keys: from the methods of these names.
            mask: blocks that may be taken (True), or floats to add; the rest gets the lowest finite number.
        """
        if keys.shape[1] < self.heads:
            keys = keys.repeat_interleave(self.heads // keys.shape[1], 1)
        logits = (queries * self.gate_dim**-0.5) @ keys.transpose(-1, -2)
        if mask is None:
            return logits
        if mask.is_floating_point():
            return logits + mask
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h_kv n d"],
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        *,
        query_block: int | None = None,
        turn: Turn | None = None,
    ) -> Float[Tensor, "b h q_blocks k_blocks"]:
        """Return the logits of all blocks of two sequences that begin at position 0; see the parts above."""
        return self.logits(self.queries(q, block=query_block, turn=turn), self.keys(k, turn=turn), mask)

    def probabilities(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h_kv n d"],
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        *,
        query_block: int | None = None,
        turn: Turn | None = None,
    ) -> Float[Tensor, "b h q_blocks k_blocks"]:
        """Return the softmax of the logits over the blocks of keys; arguments as in `forward`."""
        return self(q, k, mask, query_block=query_block, turn=turn).softmax(-1)

    def _turned(self, x: Tensor, block: int, start: int, turn: Turn | None) -> Tensor:
        if turn is not None:
            cos, sin = (part[..., None, :, : self.gate_dim // 2].to(x.dtype) for part in turn)
            return rotate(x, cos, sin)
        return rotary(x, start + block * torch.arange(x.shape[2], device=x.device), base=self.base)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, gate_dim={self.gate_dim}, block={self.block}, "
            + (f"pooling={self.pooling!r}")
        )


def true_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h_kv n d"],
    block: int,
    *,
    causal: bool = True,
    query_block: int | None = None,
    allowed: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h q_blocks k_blocks"]:
    """Return G: the largest true probability of every block, rows divided by their sum. No gradient.

    Args:
        q, k: as attention sees them.
        block: keys per block, and queries unless `query_block` says otherwise.
        causal, scale: of the attention.
        query_block: queries per block.
        allowed: blocks that the gate chooses from; others count as 0.
    """
    found = block_weights(q, k, query_block or block, block, causal=causal, scale=scale)
    found = found if allowed is None else found * allowed
    total = found.sum(-1, keepdim=True)
    return found / total.masked_fill(total == 0, 1.0)


def gate_loss(
    logits: Float[Tensor, "b h q_blocks k_blocks"], truth: Float[Tensor, "b h q_blocks k_blocks"]
) -> Float[Tensor, ""]:
    """Return the divergence of the gate from the truth, the mean over entries; the first rows are left out."""
    first = truth.shape[2] // 4
    guess = logits[:, :, first:].to(truth.dtype).log_softmax(-1)
    kept = truth[:, :, first:]
    return (torch.special.xlogy(kept, kept) - kept * guess).mean()


def choose_blocks(
    logits: Float[Tensor, "b h q_blocks k_blocks"],
    allowed: Bool[Tensor, "#q_blocks #k_blocks"],
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    triangle: bool = True,
    dense_rows: int = 0,
) -> Bool[Tensor, "b h q_blocks k_blocks"]:
    """Choose blocks by the gate's logits.

    Args:
        logits: of the gate, masked.
        allowed: (q_blocks, k_blocks), blocks that can be chosen.
        threshold: take blocks of which the row's softmax is above it.
        ratio: instead, take as many best blocks per row as leave this share of a causal map, at least one.
        triangle: whether `allowed` is the causal triangle of blocks, of which k columns are a share of
            1 - (1 - k / blocks)^2; otherwise a row takes the share of what it is allowed.
        dense_rows: last rows that take everything (2 in the authors' prefill).

    Raises:
        ArgumentError: naming `ratio`, or `threshold` when neither or both are given.
    """
    if (threshold is None) == (ratio is None):
        raise bad("threshold", threshold, "a threshold or a ratio", f"ratio={ratio!r}.")
    if ratio is None:
        chosen = choose_above(logits.softmax(-1), threshold or 0.0, allowed)
    elif not 0 <= ratio <= 1:
        raise bad("ratio", ratio, "a share between 0 and 1")
    elif triangle:
        chosen = choose_top(logits, max(1, int((1 - (1 - ratio) ** 0.5) * logits.shape[-1])), allowed)
    else:
        share = (allowed.expand(logits.shape[-2:]).sum(-1) * ratio).long().clamp(min=1)
        chosen = choose_count(logits, share, allowed)
    if dense_rows:
        last = torch.arange(logits.shape[2], device=logits.device) >= logits.shape[2] - dense_rows
        chosen = chosen | (last[:, None] & allowed)
    return chosen
