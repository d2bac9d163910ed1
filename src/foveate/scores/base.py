"""`Score`: how strongly a query attends to a key, as a change to the logits.

A score is a small immutable value. `score=a + b` and `score=(a, b)` both mean: first `a`, then `b`.
To add one of your own, derive from `Additive` and give the number to add, or from `Score` and change the
logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.scores.pairs import Pairs


class Extent(NamedTuple):
    """The sizes every per-problem value must fit: batch, query heads, queries, (real) keys."""

    batch: int
    heads: int
    n_q: int
    n_k: int


class Part:
    """What scores, rules and after-values share: tensors held in dataclass fields, and a readable repr."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors this value holds, by field name."""
        found = {}
        for field in fields(self) if is_dataclass(self) else ():
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
        return found

    def check(self, extent: Extent) -> None:
        """Raise an ArgumentError when a tensor does not fit the problem. The default accepts everything."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self) if is_dataclass(self) else ():
            value = getattr(self, field.name)
            if value is field.default:
                continue
            if isinstance(value, Tensor):
                value = f"Tensor{tuple(value.shape)}"
            elif callable(value):
                value = getattr(value, "__name__", repr(value))
            else:
                value = repr(value)
            shown.append(f"{field.name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"


class Score(Part):
    """A change to the logits. Composes with `+`, applied from left to right."""

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return the changed logits.

        Args:
            logits: scaled products, in the accumulation dtype (float32 or float64).
            at: which pairs they belong to. Values at pairs outside `where` do not matter but must be finite.
        """
        raise NotImplementedError

    def __add__(self, other: Score) -> Chain:
        if not isinstance(other, Score):
            return NotImplemented
        return Chain(as_scores(self) + as_scores(other))


class Additive(Score):
    """A score that adds a number to each logit."""

    def values(self, at: Pairs) -> Float[Tensor, "b h *cells tq tk"]:
        """Return what is added, broadcastable to the logits."""
        raise NotImplementedError

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Return `logits + values`."""
        return logits + self.values(at).to(logits.dtype)


class Chain(Score):
    """Several scores, applied in order."""

    def __init__(self, parts: Iterable[Score]):
        self.parts = tuple(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of every part."""
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def check(self, extent: Extent) -> None:
        """Check every part."""
        for part in self.parts:
            part.check(extent)

    def apply(
        self, logits: Float[Tensor, "b h *cells tq tk"], at: Pairs
    ) -> Float[Tensor, "b h *cells tq tk"]:
        """Apply every part."""
        for part in self.parts:
            logits = part.apply(logits, at)
        return logits

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def as_scores(score: Score | Iterable[Score] | None) -> tuple[Score, ...]:
    """Flatten what a user may write for `score` into the parts, in order.

    Raises:
        ArgumentError: naming `score`, when something else than a Score is found.
    """
    if score is None:
        return ()
    if isinstance(score, Chain):
        return score.parts
    if isinstance(score, Score):
        return (score,)
    if isinstance(score, (list, tuple)):
        return tuple(part for item in score for part in as_scores(item))
    hint = "Wrap a tensor in Bias(...), RowFactor(...) or KeyBias(...)." if isinstance(score, Tensor) else ""
    raise bad("score", _show(score), "a Score or a sequence of Scores", hint)


def check_fits(part: Part, name: str, shape: Iterable[int], sizes: tuple[int, ...], meaning: str) -> None:
    """Raise an ArgumentError naming `Class.name` unless `shape` broadcasts to `sizes`."""
    shape = tuple(shape)
    fits = len(shape) <= len(sizes) and all(
        s in (1, size) for s, size in zip(reversed(shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise bad(f"{type(part).__name__}.{name}", shape, f"a shape that broadcasts to {meaning} = {sizes}")


def need_float(part: Part, name: str, value: Any) -> None:
    """Raise an ArgumentError naming `Class.name` unless `value` is a floating point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise bad(f"{type(part).__name__}.{name}", _show(value), "a floating point tensor")


def lift(x: Tensor, ndim: int) -> Tensor:
    """Put size-1 dimensions in front until `x` has `ndim` dimensions."""
    return x.reshape(*([1] * (ndim - x.ndim)), *x.shape)


def per_head(x: Tensor | float, like: Tensor) -> Tensor:
    """Spread a number or an `(H,)` tensor over `like (B, H, ...)`, in its dtype."""
    if not isinstance(x, Tensor):
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)
    x = x.to(like.dtype)
    return x if x.ndim == 0 else x.reshape(-1, *([1] * (like.ndim - 2)))


def check_per_head(part: Part, name: str, value: Tensor | float | None, heads: int) -> None:
    """Raise an ArgumentError unless `value` is None, a number, a 0-d tensor or an `(H,)` tensor."""
    if isinstance(value, Tensor) and (
        value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, heads))
    ):
        raise bad(
            f"{type(part).__name__}.{name}", tuple(value.shape), f"a number, or one per head ({heads},)"
        )


def _show(value: object) -> object:
    return f"Tensor{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else value
