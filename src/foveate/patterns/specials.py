"""`with_specials`: class, register or memory tokens that stand before the grid."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.compose import refuse_phantoms
from foveate.patterns.pattern import Pattern, check_int

Rule = Literal["all", "isolated"] | Pattern


def with_specials(where: Pattern, n: int, rule: Rule = "all") -> Specials:
    """Put `n` special tokens before the tokens of `where`, among the queries and among the keys.

    Args:
        where: who attends to whom among the ordinary tokens, at ids counted from 0 after the specials.
        n: number of special tokens, >= 0. All lengths grow by `n`.
        rule: decides the pairs in which a special takes part. "all": specials attend to all and are seen by
            all. "isolated": specials see one another only, and ordinary tokens do not see them. A Pattern:
            it is asked, over the whole range of n + N tokens.

    Raises:
        ArgumentError: naming the argument that makes no sense.
        UnsupportedError: if `where` has phantom keys.
    """
    return Specials(where, n, rule)


class Specials(Pattern):
    """A pattern behind `n` special tokens; see `with_specials`."""

    fields = ("where", "n", "rule")
    where: Pattern
    n: int
    rule: Rule

    def __init__(self, where: Pattern, n: int, rule: Rule = "all"):
        if not isinstance(where, Pattern):
            raise bad("where", type(where).__name__, "a Pattern")
        refuse_phantoms(where, "put behind special tokens")
        if not isinstance(rule, Pattern) and rule not in ("all", "isolated"):
            raise bad("rule", rule, "'all', 'isolated' or a Pattern")
        if isinstance(rule, Pattern):
            refuse_phantoms(rule, "a rule for special tokens")
        self._store(where=where, n=check_int(n, "n", 0), rule=rule)

    @property
    def tokens(self) -> int | None:
        """The specials and the tokens of the inner pattern, where it fixes them."""
        return None if self.where.tokens is None else self.where.tokens + self.n

    def _default_n_k(self, n_q: int) -> int:
        return self.where._default_n_k(n_q - self.n) + self.n if n_q >= self.n else n_q

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError when the lengths, less `n`, do not fit the inner pattern."""
        super().check(n_q, n_k)
        inner = self.where.tokens
        fixed = (None, None) if inner is None else (inner, self.where._default_n_k(inner))
        for name, length, rest in zip(("n_q", "n_k"), (n_q, n_k), fixed, strict=True):
            if length < self.n:
                raise bad(name, length, f"at least the {self.n} special tokens")
            if rest is not None and length != self.n + rest:
                hint = f"{self.n} special tokens stand before the {rest} of {self.where!r}."
                raise bad(name, length, f"{self.n + rest} tokens", hint)
        self.where.check(n_q - self.n, n_k - self.n)
        if isinstance(self.rule, Pattern):
            self.rule.check(n_q, n_k)

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Ask the rule when a special takes part, the inner pattern otherwise."""
        special_q, special_k = q < self.n, k < self.n
        special = special_q | special_k
        inner = self.where.allowed(
            (q - self.n).clamp(min=0), (k - self.n).clamp(min=0), n_q - self.n, n_k - self.n
        )
        if isinstance(self.rule, Pattern):
            return torch.where(special, self.rule.allowed(q, k, n_q, n_k), inner)
        if self.rule == "all":
            return special | inner
        return (special_q & special_k) | (~special & inner)

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Inner candidates moved behind the specials; all keys as soon as a special is among the queries."""
        if bool((q_ids < self.n).any()):
            return torch.arange(n_k)
        inner = self.where.candidates(q_ids - self.n, n_q - self.n, n_k - self.n) + self.n
        return torch.cat([torch.arange(self.n), inner])

    def __repr__(self) -> str:
        return f"with_specials({', '.join(self._shown_arguments())})"
