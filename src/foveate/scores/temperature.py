"""Scores that reshape logits without looking at positions: a factor per row, and a soft cap."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Extent, Score, check_fits, lift, need_float
from foveate.scores.pairs import Pairs, take_rows


@dataclass(frozen=True, eq=False, repr=False)
class RowFactor(Score):
    """Multiply every logit of a query by a factor: temperatures, learned scales, length scaling.

    Args:
        t: float tensor broadcastable to (B, H, N_q), with gradient. One per head is `(H, 1)`.
    """

    t: Tensor

    def check(self, extent: Extent) -> None:
        """Raise unless `t` broadcasts to (B, H, N_q)."""
        need_float(self, "t", self.t)
        check_fits(self, "t", self.t.shape, (extent.batch, extent.heads, extent.n_q), "(B, H, N_q)")

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `logits * t`."""
        return logits * take_rows(lift(self.t, 3), at.q).unsqueeze(-1).to(logits.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class SoftCap(Score):
    """Keep logits within (-cap, cap): `cap * tanh(l / cap)`.

    Args:
        cap: a positive number.
    """

    cap: float

    def __post_init__(self):
        number = isinstance(self.cap, numbers.Real) and not isinstance(self.cap, bool)
        if not number or not 0 < self.cap < math.inf:
            raise bad("SoftCap.cap", self.cap, "a positive number")

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the capped logits."""
        return self.cap * torch.tanh(logits / self.cap)
