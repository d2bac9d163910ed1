"""Decoding: what every mechanism with keys and values keeps of the tokens before.

The convention: `attend(q, k, v, where=Causal(align="end"))`, in which the new queries stand at the end of the keys.
Modules offer `prefill(x (B, N, C), past=None) -> (out, past)` for a stretch of tokens that follows `past`, and
`step(x (B, C), past) -> (out, past)` for one. `past` is a value: no call changes the one it was given.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad


class Past(NamedTuple):
    """Keys and values of all tokens so far, as attention reads them (rotated, normed)."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n e"]


def length(past: Past | None) -> int:
    """Return how many tokens came before: the position of the next one."""
    return 0 if past is None else past.k.shape[2]


def extend(past: Past | None, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]) -> Past:
    """Return the past with the keys and values of the new tokens behind it.

    Raises:
        ArgumentError: naming `past`, when batch, heads or widths differ.
    """
    if past is None:
        return Past(k, v)
    for old, new in ((past.k, k), (past.v, v)):
        if old.ndim != 4 or (*old.shape[:2], old.shape[3]) != (*new.shape[:2], new.shape[3]):
            expected = f"(batch, heads, tokens, width) = {(*new.shape[:2], 'any', new.shape[3])}"
            raise bad("past", tuple(old.shape), expected, "It is the second result of prefill or step.")
    return Past(torch.cat([past.k, k], dim=2), torch.cat([past.v, v], dim=2))
