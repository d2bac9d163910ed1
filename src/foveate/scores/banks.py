"""Scores of one bank of keys: `on_keys` lifts a score over n keys onto a range of a longer key axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Additive, Chain, Extent, Score
from foveate.scores.pairs import Pairs


def on_keys(score: Score, first: int, n: int) -> Score:
    """Return `score` for the keys `first .. first + n - 1` alone, which it sees as keys 0 .. n - 1.

    Logits of all other keys stay as they are. A sum of additive scores stays additive.

    Args:
        score: a score made for n keys; relative tables, decays and grids count keys from `first`.
        first: first key of the range.
        n: keys of the range.

    Raises:
        ArgumentError: naming `first` or `n`, unless they are integers >= 0.
    """
    for name, value in (("first", first), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise bad(name, value, "an integer >= 0")
    if isinstance(score, Chain):
        return Chain(on_keys(part, first, n) for part in score.parts)
    kind = AddedOnKeys if isinstance(score, Additive) else OnKeys
    return kind(score, first, n)


@dataclass(frozen=True, eq=False, repr=False)
class OnKeys(Score):
    """A score of a range of keys; made by `on_keys`."""

    score: Score
    first: int
    n: int

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the score."""
        return self.score.tensors()

    def check(self, extent: Extent) -> None:
        """Raise unless the range lies within the keys and the score fits it."""
        if self.first + self.n > extent.n_k:
            raise bad("n", f"keys {self.first}..{self.first + self.n - 1}", f"keys below {extent.n_k}")
        self.score.check(extent._replace(n_k=self.n))

    def inside(self, at: Pairs) -> Bool[Tensor, "b h *cells 1 tk"]:
        """Say which keys of the pairs are in the range."""
        return ((at.k >= self.first) & (at.k < self.first + self.n))[..., None, :]

    def shifted(self, at: Pairs) -> Pairs:
        """Return the pairs as the score sees them; keys outside of the range read the nearest one inside."""
        # Not `alike`: a cell may lie partly outside, where clamping bends its offsets.
        k = (at.k - self.first).clamp(min=0, max=max(self.n - 1, 0))
        return Pairs(at.q, k, n_q=at.n_q, n_k=self.n)

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the logits, changed in the range."""
        if self.n == 0:
            return logits
        return torch.where(self.inside(at), self.score.apply(logits, self.shifted(at)), logits)


@dataclass(frozen=True, eq=False, repr=False)
class AddedOnKeys(OnKeys, Additive):
    """An additive score of a range of keys; made by `on_keys`."""

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `logits + values`."""
        return logits + self.values(at).to(logits.dtype)

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return what is added: 0 outside of the range."""
        assert isinstance(self.score, Additive)
        if self.n == 0:
            return torch.zeros((), device=at.k.device)
        if at.dense:
            whole = Pairs.full(at.n_q, self.n, device=at.k.device)
            inner = self.score.values(whole)
            inner = inner.expand(*inner.shape[:-1], self.n)
            return F.pad(inner, (self.first, at.n_k - self.first - self.n))
        inner = self.score.values(self.shifted(at))
        return torch.where(self.inside(at), inner, inner.new_zeros(()))
