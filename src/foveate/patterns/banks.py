"""Keys in banks: several key axes, one after the other, each with a `where` of its own.

`Beside` is the pattern of it, `beside` takes Selections and Schedules too. Queries are the same for all banks; the
keys of a bank count from 0 in its own `where`, whatever stands before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.basic import Full
from foveate.patterns.compose import refuse_phantoms
from foveate.patterns.pattern import Pattern, check_int


class Beside(Pattern):
    """Patterns side by side: the first one over the first keys, the second one over the next, and so on.

    Where all banks but the last are seen by every query (`Full`) and the last one has a closed form, so has the
    whole: as fast in the C++ core as listed cells, without the list. Everything else becomes one cell per query
    tile, with the union of the keys it sees in all banks, so that no query stands in two cells.

    Args:
        parts: one (where, number of keys) per bank, in the order of the keys; None is `Full()`. Empty banks are
            left out, unless there is no other.

    Raises:
        ArgumentError: naming `parts`.
        UnsupportedError: if a pattern has phantom keys, which have no place beside other keys.
    """

    fields = ("parts",)
    parts: tuple[tuple[Pattern, int], ...]
    first: tuple[int, ...]

    def __init__(self, parts: Sequence[tuple[Pattern | None, int]]):
        kept = []
        for where, n_k in parts:
            where = Full() if where is None else where
            if not isinstance(where, Pattern):
                hint = "beside(...) takes Selections and Schedules too."
                raise bad("parts", type(where).__name__, "a Pattern (or None) and a number of keys", hint)
            refuse_phantoms(where, "put beside other keys")
            kept.append((where, check_int(n_k, "parts", 0)))
        if not kept:
            raise bad("parts", parts, "one bank or more")
        kept = tuple(part for part in kept if part[1]) or tuple(kept[:1])
        self._store(parts=kept, first=tuple(accumulate((n for _, n in kept[:-1]), initial=0)))

    @property
    def tokens(self) -> int | None:
        """The number of queries some part fixes, if any."""
        return next((part.tokens for part, _ in self.parts if part.tokens is not None), None)

    def _default_n_k(self, n_q: int) -> int:
        return sum(n for _, n in self.parts)

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError when the keys are not those of all banks, or a part does not fit."""
        super().check(n_q, n_k)
        if n_k != self._default_n_k(n_q):
            raise bad("n_k", n_k, f"{self._default_n_k(n_q)}, the keys of {len(self.parts)} banks")
        for part, n in self.parts:
            part.check(n_q, n)

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Ask the part of the bank that the key belongs to."""
        seen = None
        for (part, n), first in zip(self.parts, self.first, strict=True):
            mine = part.allowed(q, (k - first).clamp(min=0, max=max(n - 1, 0)), n_q, n)
            mine = mine & (k >= first) & (k < first + n)
            seen = mine if seen is None else seen | mine
        assert seen is not None
        return seen

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Candidates of the parts, moved to where their keys stand."""
        both = zip(self.parts, self.first, strict=True)
        return torch.cat([part.candidates(q_ids, n_q, n) + first for (part, n), first in both])

    def _shown_arguments(self) -> list[str]:
        return [repr(self.parts)]


def beside(parts: Sequence[tuple[Any, int]], n_q: int | None = None) -> Any:
    """Return one `where` over the keys of several banks.

    Args:
        parts: one (where, number of keys) per bank: a Pattern, Selection, Schedule, or None for all keys.
        n_q: number of queries, needed where a Selection stands beside a Pattern that fits any length.

    Returns:
        A `Beside` when all parts are patterns. Otherwise a Selection with the cells of all parts; cells of the
        same queries are joined into one (by identity of their ids, on the CPU by their values too).

    Raises:
        ArgumentError: naming `parts`; among others when the cells of a part do not combine by log-sum-exp, since
            one rule runs over all keys of a query.
        UnsupportedError: if a pattern has phantom keys.
    """
    if all(where is None or isinstance(where, Pattern) for where, _ in parts):
        return Beside(parts)
    from foveate.patterns.selection import Selection  # built upon lowering, which knows `Beside`

    cells, first = [], 0
    made = [where for where, _ in parts if hasattr(where, "n_q")]
    n_q = made[0].n_q if n_q is None and made else n_q
    for where, n_k in parts:
        if where is None or isinstance(where, Pattern):
            assert n_q is not None
            where = Selection.of_pattern(where or Full(), n_q, n_k)
        elif hasattr(where, "groups"):
            where = Selection.of_schedule(where)
        if not isinstance(where, Selection):
            raise bad("parts", type(where).__name__, "a Pattern, Selection, Schedule or None")
        if (where.n_q, where.n_k) != (n_q, n_k):
            raise bad(
                "parts", f"cells for {where.n_q} x {where.n_k}", f"cells for {n_q} x {n_k}, as the bank has"
            )
        if where.combine != "lse":
            raise bad(
                "parts", f"cells combined by {where.combine!r}", "'lse', one rule over all keys of a query"
            )
        for cell in where.cells:
            cells = _joined(cells, cell.shifted(first))
        first += n_k
    assert n_q is not None
    device = next((where.device for where in made if hasattr(where, "device")), torch.device("cpu"))
    return Selection.of_cells(cells, n_q, first).to(device)


def _joined(cells: list, new: Any) -> list:
    """Append cells, to those of the very same queries where there are such."""
    for at, old in enumerate(cells):
        if old.same_queries(new):
            return [*cells[:at], old.beside(new), *cells[at + 1 :]]
    return [*cells, new]
