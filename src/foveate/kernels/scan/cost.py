"""What a scan costs, in plain numbers: operations, bytes, and where it overtakes dense causal attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foveate.core.errors import bad

Decay = Literal["none", "head", "token", "channel"]


@dataclass(frozen=True)
class ScanCost:
    """Counts of one forward pass over a batch.

    Attributes:
        flops: operations in matrix products, a multiply-add counted as two, as torch's FlopCounterMode does.
            The two-sided and the reverse scan are built from causal ones; multiply accordingly.
        io_bytes: q, k, v, decay read and the output written once.
        state_bytes: the state handed from token to token, which decoding keeps.
    """

    flops: int
    io_bytes: int
    state_bytes: int


def scan_cost(
    *,
    batch: int,
    heads: int,
    n: int,
    dk: int,
    dv: int,
    decay: Decay = "head",
    chunk: int = 64,
    itemsize: int = 4,
) -> ScanCost:
    """Count a causal `scan` in chunk form.

    Args:
        batch, heads, n, dk, dv: the shapes of q (batch, heads, n, dk) and v (batch, heads, n, dv).
        decay: "none", "head" (H,), "token" (B, H, N) or "channel" (B, H, N, D_k).
        chunk: tokens per chunk.
        itemsize: bytes per element of q, k, v and the output; states take at least 4.

    Raises:
        ArgumentError: for a decay that is none of the four words.
    """
    per_token = {"none": 0, "head": 0, "token": 1, "channel": dk}
    if decay not in per_token:
        raise bad("decay", decay, f"one of {tuple(per_token)}")
    per_head = _all_chunks(n, chunk, dk, dv, decay)
    wide = max(itemsize, 4)
    elements = batch * heads * n * (2 * dk + 2 * dv)
    return ScanCost(
        flops=batch * heads * per_head,
        io_bytes=elements * itemsize + batch * heads * n * per_token[decay] * wide,
        state_bytes=batch * heads * dk * dv * wide,
    )


def crossover_length(*, dk: int, dv: int, decay: Decay = "head", chunk: int = 64) -> int:
    """The sequence length from which a scan needs fewer operations than dense causal attention.

    Dense causal attention is counted at its N (N + 1) / 2 pairs, 2 (dk + dv) operations each.
    """
    per_token = _chunk_flops(chunk, dk, dv, decay) / chunk
    return max(1, int(per_token // (dk + dv)))


def backward_flops(*, batch: int, heads: int, n: int, dk: int, dv: int, decay: Decay, chunk: int) -> int:
    """Operations of the C++ core's backward, which computes scores and states again; counted as `scan_cost` does.

    Of a chunk: the scores and their gradient, from them the gradients of q, k and v; the state, and what its
    gradient and it have to do with q, k and v.
    """
    return batch * heads * _all_chunks(n, chunk, dk, dv, decay, (3, 2, 10))


def _all_chunks(
    n: int, chunk: int, dk: int, dv: int, decay: Decay, parts: tuple[int, int, int] = (1, 1, 4)
) -> int:
    """Operations of one head."""
    whole, rest = divmod(n, chunk)
    return whole * _chunk_flops(chunk, dk, dv, decay, parts) + (
        _chunk_flops(rest, dk, dv, decay, parts) if rest else 0
    )


def _chunk_flops(c: int, dk: int, dv: int, decay: Decay, parts: tuple[int, int, int] = (1, 1, 4)) -> int:
    """Operations of one chunk of c tokens: scores, their values, queries on the state, pairs into it.

    `parts`: how many products there are of the scores' size, of their values', and multiply-adds with a state.
    """
    scores = 2 * c * c * dk
    if decay == "channel":
        padded = 1 << max(c - 1, 0).bit_length()
        # Only halves against halves; a token's own score is an elementwise product.
        scores = padded * (padded - 1) * dk
    return parts[0] * scores + parts[1] * 2 * c * c * dv + parts[2] * c * dk * dv
