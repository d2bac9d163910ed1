"""Boolean algebra of patterns: what `&`, `|` and `~` build.

An intersection of separable patterns stays separable where the progressions of each axis meet in one
(`AxisRule.intersect`), and then lowers in closed form; everything else lowers through `candidates`.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import UnsupportedError, bad
from foveate.patterns.axis import AxisRule
from foveate.patterns.basic import Full
from foveate.patterns.pattern import Pattern


def intersection(left: Pattern, right: Pattern) -> Pattern:
    """Return `left & right`; `Full` is the identity, and equal parts count once.

    Raises:
        UnsupportedError: if a part has phantom keys.
    """
    parts = _distinct(And, left, right)
    kept = tuple(part for part in parts if not isinstance(part, Full))
    return (kept or parts)[0] if len(kept) <= 1 else And(*kept)


def union(left: Pattern, right: Pattern) -> Pattern:
    """Return `left | right`; equal parts count once.

    Raises:
        UnsupportedError: if a part has phantom keys.
    """
    parts = _distinct(Or, left, right)
    return parts[0] if len(parts) == 1 else Or(*parts)


def complement(pattern: Pattern) -> Pattern:
    """Return `~pattern`; the complement of a complement is the pattern itself.

    Raises:
        UnsupportedError: if the pattern has phantom keys.
    """
    return pattern.part if isinstance(pattern, Not) else Not(pattern)


class _Composed(Pattern):
    """Several patterns that hold for the same queries and keys."""

    fields = ("parts",)
    parts: tuple[Pattern, ...]
    symbol = ""

    def __init__(self, *parts: Pattern):
        if len(parts) < 2:
            raise bad("parts", parts, "two patterns or more")
        for part in parts:
            refuse_phantoms(part, f"combined with {self.symbol}")
        self._store(parts=parts)

    @property
    def tokens(self) -> int | None:
        """The length some part fixes, if any."""
        return next((part.tokens for part in self.parts if part.tokens is not None), None)

    def _default_n_k(self, n_q: int) -> int:
        return next((n for part in self.parts if (n := part._default_n_k(n_q)) != n_q), n_q)

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError when a part does not fit."""
        for part in self.parts:
            part.check(n_q, n_k)

    # The order of the parts is kept for the eye only.
    def _key(self) -> object:
        return frozenset(self.parts)

    def __repr__(self) -> str:
        return f"({f' {self.symbol} '.join(map(repr, self.parts))})"


class And(_Composed):
    """Pairs that all parts allow; written `a & b`."""

    symbol = "&"

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """AND of the parts."""
        return reduce(lambda a, b: a & b, (part.allowed(q, k, n_q, n_k) for part in self.parts))

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...] | None:
        met = self.parts[0].axes(n_q, n_k)
        for part in self.parts[1:]:
            axes = part.axes(n_q, n_k)
            if met is None or axes is None or len(met) != len(axes):
                return None
            rules = [a.intersect(b) for a, b in zip(met, axes, strict=True)]
            met = tuple(rule for rule in rules if rule is not None)
            if len(met) != len(rules):
                return None
        return met

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Intersection of the parts' candidates."""
        every = (part.candidates(q_ids, n_q, n_k) for part in self.parts)
        return reduce(lambda a, b: a[torch.isin(a, b, assume_unique=True)], every)


class Or(_Composed):
    """Pairs that some part allows; written `a | b`."""

    symbol = "|"

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """OR of the parts."""
        return reduce(lambda a, b: a | b, (part.allowed(q, k, n_q, n_k) for part in self.parts))

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Union of the parts' candidates."""
        return torch.cat([part.candidates(q_ids, n_q, n_k) for part in self.parts]).unique()


class Not(Pattern):
    """Pairs the part does not allow; written `~a`."""

    fields = ("part",)
    part: Pattern

    def __init__(self, part: Pattern):
        refuse_phantoms(part, "complemented with ~")
        self._store(part=part)

    @property
    def tokens(self) -> int | None:
        """The length the part fixes, if any."""
        return self.part.tokens

    def _default_n_k(self, n_q: int) -> int:
        return self.part._default_n_k(n_q)

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError when the part does not fit."""
        self.part.check(n_q, n_k)

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """NOT of the part."""
        return ~self.part.allowed(q, k, n_q, n_k)

    def __repr__(self) -> str:
        return f"~{self.part!r}"


def refuse_phantoms(part: Pattern, doing: str) -> None:
    """Raise an UnsupportedError when `part` has phantom keys: they have no place in a boolean algebra."""
    if part.has_phantoms:
        raise UnsupportedError(
            f"{part!r} has border='zero' and cannot be {doing}: its phantom keys have no mask entry. "
            "Use border='mask' or border='clamp'."
        )


def _distinct(kind: type[_Composed], *patterns: Pattern) -> tuple[Pattern, ...]:
    flat = [part for p in patterns for part in (p.parts if isinstance(p, kind) else (p,))]
    return tuple(dict.fromkeys(flat))
