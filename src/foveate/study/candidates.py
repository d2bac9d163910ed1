"""Candidates of `recall`: named ways to choose pairs, each at a budget, and the one place they are registered.

A candidate is a function of queries and keys that needs no training, `(q, k) -> Pattern | Selection`; static
patterns look at the shapes only. A *family* makes the candidates that fit a `Setting`, one per budget:

    @family("every third key", kind="static")
    def thirds(setting):
        yield "BlockList ...", lambda q, k: BlockList(1, ...)

A family that cannot serve a setting raises an ArgumentError; its sentence stands in the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from torch import Tensor

from foveate.core.errors import FoveateError, bad, unknown
from foveate.core.grid import Grid
from foveate.patterns.basic import Causal
from foveate.patterns.pattern import Pattern
from foveate.patterns.selection import Selection

Kind = Literal["static", "content"]
Router = Callable[[Tensor, Tensor], Pattern | Selection]
KINDS = ("static", "content")
# Shares of all pairs a candidate is asked to spend; what it really spends is counted.
BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What candidates are made for.

    Attributes:
        n: number of tokens; queries and keys are the same ones.
        grid: their geometry; one axis for a sequence.
        causal: whether a query sees no key after it. Choices are intersected with `Causal()` afterwards, so
            that a router need not do it; one that spends its budget on later keys wastes it.
        budgets: shares of the N x N pairs to be spent, ascending.
    """

    n: int
    grid: Grid
    causal: bool = False
    budgets: tuple[float, ...] = BUDGETS

    def __post_init__(self):
        self.grid.check_tokens(self.n, "grid")
        if not self.budgets or not all(0 < share <= 1 for share in self.budgets):
            raise bad("budgets", self.budgets, "shares of all pairs, each above 0 and at most 1")
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))

    def keys(self, share: float) -> int:
        """Keys per query at a budget, at least one."""
        return max(1, min(self.n, round(share * self.n)))

    @property
    def sequence(self) -> Grid:
        """The tokens in a row, whatever their geometry."""
        return Grid(self.n)


@dataclass(frozen=True)
class Candidate:
    """One way to choose pairs.

    Attributes:
        family: what it is a member of.
        label: the member, with its sizes.
        kind: "static" looks at shapes only, "content" at q and k.
        choose: the function.
    """

    family: str
    label: str
    kind: Kind
    choose: Router

    def where(self, q: Tensor, k: Tensor, *, causal: bool) -> Pattern | Selection:
        """Choose, and take later keys away where `causal`.

        Raises:
            ArgumentError: if the function returns anything but a Pattern or a Selection for these lengths.
        """
        where = self.choose(q, k)
        if not isinstance(where, Pattern | Selection):
            raise bad(self.label, type(where).__name__, "a function that returns a Pattern or a Selection")
        where.check(q.shape[2], k.shape[2])
        return where & Causal() if causal else where


Members = Iterable[tuple[str, Router]]


@dataclass(frozen=True)
class Family:
    """A named maker of candidates; `members(setting)` yields (label, router), one per budget or fewer."""

    name: str
    kind: Kind
    members: Callable[[Setting], Members]


_FAMILIES: dict[str, Family] = {}


def family(
    name: str, *, kind: Kind
) -> Callable[[Callable[[Setting], Members]], Callable[[Setting], Members]]:
    """Register the decorated maker of candidates under `name`; a second one of that name replaces the first.

    Raises:
        ArgumentError: naming `kind`.
    """
    if kind not in KINDS:
        raise bad("kind", kind, "'static' or 'content'")

    def record(make: Callable[[Setting], Members]) -> Callable[[Setting], Members]:
        _FAMILIES[name] = Family(name, kind, make)
        return make

    return record


def families(only: Sequence[str] | None = None) -> list[Family]:
    """Return the registered families in order, those whose name matches a shell pattern of `only`.

    Raises:
        UnknownNameError: for a pattern that no name matches.
    """
    # The library's own ones register themselves.
    import foveate.study.routers
    import foveate.study.statics  # noqa: F401

    for wanted in only or ():
        if not any(fnmatch(name, wanted) for name in _FAMILIES):
            raise unknown("family", wanted, _FAMILIES)
    return [
        found
        for found in _FAMILIES.values()
        if only is None or any(fnmatch(found.name, wanted) for wanted in only)
    ]


def members(found: Family, setting: Setting) -> Iterator[Candidate]:
    """Yield the candidates of a family; equal labels (two budgets, one size) come once."""
    seen = set()
    for label, choose in found.members(setting):
        if label not in seen:
            seen.add(label)
            yield Candidate(found.name, label, found.kind, choose)


def candidates(setting: Setting, only: Sequence[str] | None = None) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates for a setting, and why families that have none refuse it.

    Args:
        setting: sizes, geometry and budgets.
        only: names of families, or shell patterns over them; all by default.

    Raises:
        UnknownNameError: for a name that no family has.
    """
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for entry in families(only):
        try:
            found += members(entry, setting)
        except FoveateError as error:
            refused[entry.name] = str(error)
    return found, refused
