"""Rules: how logits become weights. `weigh=Softmax()` is the default.

A rule is `f(logit)`, what it accumulates over a row (a row sum, or nothing) and what it does with it at
the end. From this follows how pieces of a row combine: rules with a row sum merge by log-sum-exp, rules
without by plain sum, and a rule that must see the whole row at once says `mergeable = None`.
A pair that may not attend has logit -inf, and every rule gives it weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Extent, Part, check_per_head, per_head

NEG_INF = float("-inf")


class Rule(Part):
    """How logits become weights.

    Attributes:
        mergeable: how partial results over disjoint keys combine: "lse", "sum", or None (they do not).
        has_lse: whether the rule has a row sum whose logarithm can be returned.
    """

    mergeable: ClassVar[Literal["lse", "sum"] | None] = None
    has_lse: ClassVar[bool] = False

    def weights(
        self,
        logits: Float[Tensor, "b h *cells tq tk"],
        allowed: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b h *cells tq tk"], Float[Tensor, "b h *cells tq"] | None]:
        """Return the weights and the log row sum (None for rules without one).

        Args:
            logits: in the accumulation dtype.
            allowed: bool, broadcastable to the logits; pairs that are not allowed get weight 0.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Rule):
    """`exp(l_k) / sum_k exp(l_k)`; a row without keys gives zeros and lse -inf, with zero gradients.

    Args:
        sink: a logit that joins the sum but has no value: a number or an `(H,)` tensor (learned, with
            gradient). The lse includes it.
    """

    mergeable = "lse"
    has_lse = True
    sink: Tensor | float | None = None

    def check(self, extent: Extent) -> None:
        """Raise unless the sink is a number or one per head."""
        check_per_head(self, "sink", self.sink, extent.heads)

    def weights(
        self,
        logits: Float[Tensor, "b h *cells tq tk"],
        allowed: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b h *cells tq tk"], Float[Tensor, "b h *cells tq"]]:
        """Return the softmax and the log-sum-exp of every row."""
        logits = hide(logits, allowed)
        # Subtracting a constant changes nothing, at no order of differentiation, so the maximum is detached.
        if logits.shape[-1]:
            top = logits.detach().amax(-1, keepdim=True)
        else:
            top = logits.new_full((*logits.shape[:-1], 1), NEG_INF)
        sink = None if self.sink is None else per_head(self.sink, logits)
        if sink is not None:
            top = torch.maximum(top, sink.detach())
        top = top.masked_fill(top == NEG_INF, 0.0)
        powers = torch.exp(logits - top)
        total = powers.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - top)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        lse = (top + total.log()).masked_fill(empty, NEG_INF).squeeze(-1)
        return powers / total, lse

    def bare(self) -> Softmax:
        """Return the rule without its sink, for kernels that add it once at the end with `finish`."""
        return Softmax()

    def finish(
        self, out: Float[Tensor, "b h n d"], lse: Float[Tensor, "b h n"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """Add the sink to a finished result of the bare rule."""
        if self.sink is None:
            return out, lse
        sink = per_head(self.sink, lse).expand_as(lse)
        share = torch.sigmoid(lse - sink).unsqueeze(-1)
        return (out * share).to(out.dtype), torch.logaddexp(lse, sink)


class ElementRule(Rule):
    """A rule that looks at one logit at a time: no row sum, pieces combine by plain sum."""

    mergeable = "sum"

    def f(self, logits: Float[Tensor, "b h *cells tq tk"]) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the weight of each logit; `f(-inf)` must be 0 with zero gradient."""
        raise NotImplementedError

    def weights(
        self,
        logits: Float[Tensor, "b h *cells tq tk"],
        allowed: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b h *cells tq tk"], None]:
        """Return `f(logits)` where allowed, 0 elsewhere; there is no lse."""
        return self.f(hide(logits, allowed)), None


@dataclass(frozen=True, eq=False, repr=False)
class Sigmoid(ElementRule):
    """`1 / (1 + exp(-(l + bias)))`: each weight by itself, no coupling between keys (arXiv 2409.04431).

    Args:
        bias: a number or an `(H,)` tensor; `-log(n)` of the training length keeps the row's mass near 1.
    """

    bias: Tensor | float = 0.0

    def check(self, extent: Extent) -> None:
        """Raise unless the bias is a number or one per head."""
        if self.bias is None:
            raise bad("Sigmoid.bias", None, "a number or an (H,) tensor")
        check_per_head(self, "bias", self.bias, extent.heads)

    def f(self, logits: Float[Tensor, "b h *cells tq tk"]) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `sigmoid(logits + bias)`."""
        return torch.sigmoid(logits + per_head(self.bias, logits))


@dataclass(frozen=True, eq=False, repr=False)
class ReLU(ElementRule):
    """`max(l, 0)`: sparse weights that do not sum to one."""

    def f(self, logits: Float[Tensor, "b h *cells tq tk"]) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `relu(logits)`."""
        return torch.relu(logits)


@dataclass(frozen=True, eq=False, repr=False)
class Exp(ElementRule):
    """`exp(l)` without any normalisation. It overflows for large logits: the mathematics, nothing hidden."""

    def f(self, logits: Float[Tensor, "b h *cells tq tk"]) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `exp(logits)`."""
        return torch.exp(logits)


def hide(logits: Float[Tensor, "..."], allowed: Bool[Tensor, "..."] | None) -> Float[Tensor, "..."]:
    """Set the logits of pairs that may not attend to -inf."""
    return logits if allowed is None else logits.masked_fill(~allowed, NEG_INF)


def as_rule(weigh: Rule | None) -> Rule:
    """Return the rule a user asked for, `Softmax()` when none was.

    Raises:
        ArgumentError: naming `weigh`, when it is not a Rule instance.
    """
    if weigh is None:
        return Softmax()
    if not isinstance(weigh, Rule):
        hint = f"Write weigh={weigh.__name__}()." if isinstance(weigh, type) else ""
        raise bad("weigh", weigh, "a Rule such as Softmax(), Sigmoid(bias=...), ReLU() or Exp()", hint)
    return weigh
