"""The register of published systems: a decorator that records facts beside a class, and the look-ups.

`foveate list`, the catalogue in the docs, the support matrix and the parametrisation of the tests
are all generated from these records; there is no second list. Third parties add their own systems
through an entry point in the group `foveate.systems`, which names a module to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from foveate.core.errors import bad, unknown

Fidelity = Literal["vectors", "code", "paper", "reconstruction"]
Layout = Literal["tokens", "spatial", "cross"]
Causal = Literal["no", "always", "optional"]

ENTRY_POINT_GROUP = "foveate.systems"
FIDELITIES = ("vectors", "code", "paper", "reconstruction")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is declared, and tested, about one system.

    Attributes:
        key: the name users type.
        title: title of the paper.
        arxiv: arXiv id, or "" when the paper is elsewhere.
        year: year of the paper.
        family: room of `mechanisms/` (local, routed, linear, scored, gated, baseline, ...).
        role: what the system is (pattern, router, module, gate, linear-kernel, score, ...).
        layout: "tokens" (B, N, C) with a Grid, "spatial" (B, C, *spatial), or "cross": queries (B, Q, C) and
            sources of its own, `forward(x, *sources)`. A cross system is no layer for one grid's tokens: it has
            no `for_workload`, but `example(x)`, which returns sources that fit queries `x`.
        fidelity: "vectors" equal to the authors' code on its vectors; "code" follows the code, no vectors;
            "paper" from the paper's text; "reconstruction" the equations are partly ours.
        primitive: which primitive computes it ("attend", "scan", "apply", ... or "own (reason)").
        causal: "no", "always" or "optional" (a constructor option).
        cost: asymptotic cost in N tokens and C channels.
        limits: what it cannot do, as a sentence, or "".
        sizes: grid sizes it accepts: "any", or a phrase tested by refusing the others.
        dims: numbers of grid axes it accepts.
        batch_coupled: whether one sample's output depends on the others in its batch.
        frozen_params: parameters that get no gradient by the paper's design.
        cls: the class (or callable) that builds it.
    """

    key: str
    title: str
    arxiv: str
    year: int
    family: str
    role: str
    cost: str
    layout: Layout = "tokens"
    fidelity: Fidelity = "paper"
    primitive: str = "attend"
    causal: Causal = "no"
    limits: str = ""
    sizes: str = "any"
    dims: tuple[int, ...] = (1, 2, 3)
    batch_coupled: bool = False
    frozen_params: tuple[str, ...] = ()
    cls: Callable[..., Any] = field(repr=False)

    @property
    def paper(self) -> str:
        """Title, year and arXiv id on one line."""
        tail = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.title} ({self.year}{tail})"

    @property
    def doc(self) -> str:
        """The module docstring of the system's file: paper, idea, equation."""
        return inspect.getdoc(inspect.getmodule(self.cls)) or ""


_SYSTEMS: dict[str, Facts] = {}
_loaded = False
T = TypeVar("T", bound=Callable[..., Any])


def system(**facts: Any) -> Callable[[T], T]:
    """Register the decorated class under `key` with its facts (see `Facts`).

    Raises:
        ArgumentError: if the key is taken by another class or the fidelity is not a known word.
    """

    def record(cls: T) -> T:
        entry = Facts(cls=cls, **facts)
        taken = _SYSTEMS.get(entry.key)
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise bad("key", entry.key, f"a key that is not taken (by {taken.cls.__module__})")
        if entry.fidelity not in FIDELITIES:
            raise bad("fidelity", entry.fidelity, f"one of {FIDELITIES}")
        _SYSTEMS[entry.key] = entry
        return cls

    return record


def _load() -> None:
    """Import everything that registers systems: the package's own mechanisms, then entry points."""
    global _loaded
    if _loaded:
        return
    # By name, because `core` may not import the rooms above it.
    import_module("foveate.mechanisms")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()
    _loaded = True


def get_system(key: str) -> Facts:
    """Return the facts of one system.

    Raises:
        UnknownNameError: with the nearest names.
    """
    _load()
    if key not in _SYSTEMS:
        raise unknown("system", key, _SYSTEMS)
    return _SYSTEMS[key]


def list_systems(
    pattern: str = "*", *, family: str | None = None, role: str | None = None, fidelity: str | None = None
) -> list[Facts]:
    """Return the records of all systems whose key matches a shell `pattern`, sorted by key.

    Args:
        pattern: shell wildcard over keys, such as "*neighborhood*".
        family, role, fidelity: keep only records with exactly this value.
    """
    _load()
    wanted = {"family": family, "role": role, "fidelity": fidelity}
    return [
        facts
        for key, facts in sorted(_SYSTEMS.items())
        if fnmatch(key, pattern) and all(v is None or getattr(facts, k) == v for k, v in wanted.items())
    ]


def create(key: str, **options: Any) -> Any:
    """Build one system by key: `create("biformer", dim=64, heads=4)`.

    Raises:
        UnknownNameError: unknown key, with the nearest names.
        ArgumentError: an option the system does not have, with those it has.
    """
    cls = get_system(key).cls
    known = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for name in options:
            if name not in known:
                raise bad(name, options[name], f"an option of {key!r}: {', '.join(known)}")
    missing = [
        n for n, p in known.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY and n not in options
    ]
    if missing:
        raise bad("options", sorted(options), f"also {', '.join(missing)} for {key!r}")
    return cls(**options)
