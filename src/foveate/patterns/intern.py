"""Patterns that torch.compile meets: every equal pattern stands for one object that really exists.

A pattern written inside a compiled function, as in `attend(q, k, v, where=Causal())`, exists only in the
tracer's books: nothing can be derived from it for real. So its constructor arguments, which are constants,
name an object that is made for real, kept, and read back as an attribute. (`~` is the one operator that
torch.compile does not trace on objects of ours; write such patterns outside.)
"""

from __future__ import annotations

from typing import Any

import torch

from foveate.core.grid import Grid
from foveate.core.tracing import constant_while_tracing, fixed
from foveate.patterns.axis import LocalAxis
from foveate.patterns.compose import And, Or
from foveate.patterns.pattern import Padded, Pattern


class _Kept:
    """Objects as attributes: unlike a dictionary's items, tracing sees attributes added while it runs."""


class _Opaque(Exception):
    """A part is no constant: a mask tensor, or a pattern of somebody else's with other attributes."""


_KEPT = _Kept()
_NAMES: dict[Any, str] = {}
_AXIS = ("size", "offset", "group", "dilation", "origin", "border", "causal")


def interned(where: Any) -> Any:
    """Return the kept equal of a Pattern while compiling; `where` itself otherwise."""
    if not torch.compiler.is_compiling() or not isinstance(where, Pattern):
        return where
    spec = describe(where)
    return where if spec is None else getattr(_KEPT, _keep(spec))


def padded(where: Pattern) -> Padded | None:
    """Return `where.padded()`, also while compiling."""
    spec = describe(where) if torch.compiler.is_compiling() else None
    return where.padded() if spec is None else getattr(_KEPT, _keep_padded(spec))


def describe(where: Pattern) -> tuple | None:
    """Return the pattern as nested tuples of classes and constants, None if it holds something else."""
    try:
        return _describe(where)
    except _Opaque:
        return None


def restore(spec: Any) -> Any:
    """Make what `describe` described."""
    if not isinstance(spec, (tuple, list)):
        return spec
    kind, *parts = spec
    parts = [restore(part) for part in parts]
    return tuple(parts) if kind is tuple else kind(*parts)


def _describe(x: Any) -> Any:
    if x is None or isinstance(x, (bool, float, str)):
        return x
    if isinstance(x, int):
        return fixed(x)
    if isinstance(x, tuple):
        return (tuple, *[_describe(part) for part in x])
    if isinstance(x, Grid):
        return (Grid, *[fixed(size) for size in x.sizes])
    if isinstance(x, LocalAxis):
        return (LocalAxis, *[_describe(getattr(x, name)) for name in _AXIS])
    if isinstance(x, (And, Or)):
        return (type(x), *[_describe(part) for part in x.parts])
    if isinstance(x, Pattern):
        return (type(x), *[_describe(getattr(x, name)) for name in x.fields])
    raise _Opaque


@constant_while_tracing
def _keep(spec: Any) -> str:
    return _kept(("pattern", spec), lambda: restore(spec))


@constant_while_tracing
def _keep_padded(spec: Any) -> str:
    return _kept(("padded", spec), lambda: restore(spec).padded())


def _kept(key: Any, make: Any) -> str:
    key = _hashable(key)
    if key not in _NAMES:
        name = f"kept_{len(_NAMES)}"
        setattr(_KEPT, name, make())
        _NAMES[key] = name
    return _NAMES[key]


def _hashable(x: Any) -> Any:
    return tuple(_hashable(part) for part in x) if isinstance(x, (tuple, list)) else x
