"""What attention really looks at, per block: the truth that routers are trained on and measured by.

The map is made a few rows at a time and never held: memory goes with rows x N, not with N x N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.patterns.pattern import check_int
from foveate.routing.blocks import block_count

# Entries of the map that are held at a time, per batch element and head.
_ENTRIES = 1 << 20


@torch.no_grad()
def block_weights(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    block_q: int,
    block_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h q_blocks k_blocks"]:
    """Return the largest attention probability in every block of the map. No gradient.

    Args:
        q: queries as attention sees them (rotated, for instance).
        k: keys likewise; H_kv divides H.
        block_q, block_k: tokens per block; 1 is no pooling along that axis.
        causal: whether query i sees keys up to n_k - n_q + i only.
        scale: factor on q.k^T, D**-0.5 by default.

    Raises:
        ArgumentError: naming `k` when its heads do not divide those of `q`, or a size.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    blocks = block_count(n_k, block_k)
    pooled = []
    for weights in _rows(q, k, check_int(block_q, "block_q", 1), causal, scale):
        wide = functional.pad(weights, (0, blocks * block_k - n_k)).unflatten(-1, (blocks, block_k)).amax(-1)
        rows = block_count(wide.shape[2], block_q)
        wide = functional.pad(wide, (0, 0, 0, rows * block_q - wide.shape[2]))
        pooled.append(wide.unflatten(2, (rows, block_q)).amax(3))
    if not pooled:
        return q.new_zeros(*q.shape[:2], block_count(n_q, block_q), blocks)
    return torch.cat(pooled, 2)


def block_recall(
    weights: Float[Tensor, "*batch k_blocks"], chosen: Bool[Tensor, "*batch k_blocks"]
) -> Float[Tensor, "*batch"]:
    """Return the share of each row's true block weights that the chosen blocks have; 1 where there is none."""
    total = weights.sum(-1)
    found = (weights * chosen).sum(-1)
    return torch.where(total > 0, found / total.masked_fill(total == 0, 1.0), 1.0)


def _rows(
    q: Tensor, k: Tensor, block_q: int, causal: bool, scale: float | None
) -> Iterator[Float[Tensor, "b h rows n_k"]]:
    """Yield the attention map, whole blocks of rows at a time."""
    _, h, n_q, d = q.shape
    h_kv, n_k = k.shape[1], k.shape[2]
    if h_kv == 0 or h % h_kv:
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {h} heads of q")
    compute = accumulation_dtype(q.dtype)
    factor = d**-0.5 if scale is None else scale
    keys = k.to(compute).transpose(-1, -2)
    step = block_q * max(1, _ENTRIES // max(block_q * n_k, 1))
    for first in range(0, n_q, step):
        part = (q[:, :, first : first + step].to(compute) * factor).unflatten(1, (h_kv, h // h_kv))
        logits = (part @ keys[:, :, None]).flatten(1, 2)
        if causal:
            at = torch.arange(n_k - n_q + first, n_k - n_q + first + logits.shape[2], device=q.device)
            future = torch.arange(n_k, device=q.device) > at[:, None]
            # Rows in front of all keys have no map; softmax would make NaN of them.
            yield logits.masked_fill(future, float("-inf")).softmax(-1).masked_fill(future, 0.0)
        else:
            yield logits.softmax(-1)
