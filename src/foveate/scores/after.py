"""`after`: what happens to the weights once the rule has made them. Nothing here renormalises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.base import Additive, Extent, Part, check_fits, lift
from foveate.scores.pairs import Pairs, take_pairs


class After(Part):
    """A change to the weights. Pairs outside `where` and `mask` keep weight 0 whatever it does.

    Attributes:
        linear: multiplies each weight by something that does not depend on the weights, so that it can be
            done before rows are normalised or pieces merged.
    """

    linear: bool = False

    def apply(
        self, weights: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the changed weights."""
        raise NotImplementedError


class _Map(After):
    """An after-value made of a map over pairs: a tensor, or an additive score used for its values."""

    _field: str

    def check(self, extent: Extent) -> None:
        """Raise unless the map fits the problem."""
        value = getattr(self, self._field)
        if isinstance(value, Additive):
            value.check(extent)
        elif isinstance(value, Tensor) and value.is_floating_point():
            check_fits(self, self._field, value.shape, tuple(extent), "(B, H, N_q, N_k)")
        else:
            raise bad(
                f"{type(self).__name__}.{self._field}", value, "a floating point tensor or an additive Score"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the map."""
        value = getattr(self, self._field)
        return value.tensors() if isinstance(value, Additive) else {self._field: value}

    def _read(self, at: Pairs, *, phantom: float) -> Tensor:
        value = getattr(self, self._field)
        if isinstance(value, Additive):
            return value.values(at)
        return take_pairs(lift(value, 4), at, phantom=phantom)


@dataclass(frozen=True, eq=False, repr=False)
class Multiply(_Map):
    """Multiply the weights by a map: Toeplitz factors, a path decay, another attention map.

    Args:
        factor: tensor broadcastable to (B, H, N_q, N_k), or an additive Score whose values are the factors
            (a `RelativeTable` makes a Toeplitz factor). Phantom keys have factor 1 under a tensor.
    """

    _field = "factor"
    linear = True
    factor: Tensor | Additive

    def apply(
        self, weights: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `weights * factor`."""
        return weights * self._read(at, phantom=1.0).to(weights.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Add(_Map):
    """Add a map to the weights, at the pairs that may attend.

    Args:
        term: tensor broadcastable to (B, H, N_q, N_k), or an additive Score whose values are added.
    """

    _field = "term"
    term: Tensor | Additive

    def apply(
        self, weights: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `weights + term`."""
        return weights + self._read(at, phantom=0.0).to(weights.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Dropout(After):
    """Set weights to 0 with probability `p` and divide the rest by `1 - p`. Leave it out to evaluate.

    The same generator state gives the same draws on the same backend; different backends draw in a different
    order.

    Args:
        p: probability of dropping, 0 <= p <= 1.
        generator: where the draws come from; the global one by default.
        keep: the draws themselves, bool broadcastable to (B, H, N_q, N_k), True = kept. Nothing is drawn
            then.
    """

    linear = True
    p: float
    generator: torch.Generator | None = None
    keep: Tensor | None = None

    def __post_init__(self):
        if not 0.0 <= self.p <= 1.0:
            raise bad("Dropout.p", self.p, "a probability between 0 and 1")

    def check(self, extent: Extent) -> None:
        """Raise unless the draws fit the problem."""
        if self.keep is None:
            return
        if self.keep.dtype != torch.bool:
            raise bad("Dropout.keep", self.keep.dtype, "a bool tensor, True = kept")
        check_fits(self, "keep", self.keep.shape, tuple(extent), "(B, H, N_q, N_k)")

    def apply(
        self, weights: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the weights with some dropped."""
        if self.keep is not None:
            keep = take_pairs(lift(self.keep, 4), at, phantom=True)
        elif self.p == 0.0:
            return weights
        else:
            draws = torch.rand(
                weights.shape, generator=self.generator, device=weights.device, dtype=torch.float32
            )
            keep = draws >= self.p
        scale = 0.0 if self.p == 1.0 else 1.0 / (1.0 - self.p)
        return weights * keep.to(weights.dtype) * scale


def as_afters(after: After | Iterable[After] | None) -> tuple[After, ...]:
    """Flatten what a user may write for `after` into the parts, in order.

    Raises:
        ArgumentError: naming `after`, when something else than an After is found.
    """
    if after is None:
        return ()
    if isinstance(after, After):
        return (after,)
    if isinstance(after, (list, tuple)):
        return tuple(part for item in after for part in as_afters(item))
    hint = "Wrap a tensor in Multiply(...) or Add(...)." if isinstance(after, Tensor) else ""
    shown = f"Tensor{tuple(after.shape)}" if isinstance(after, Tensor) else after
    raise bad("after", shown, "Multiply(...), Add(...), Dropout(...) or a sequence of them", hint)
