"""Patterns that modules build on the grid they are given: built once, kept, and left alone by torch.compile.

A pattern is Python over integers; tracing its construction would be wasted work, and objects made while
tracing have no identity that later calls could be guarded by. So it is made for real, kept under a name, and
read back.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from foveate.core.grid import Grid
from foveate.core.tracing import constant_while_tracing
from foveate.patterns.pattern import Pattern

P = TypeVar("P", bound=Pattern)


class _Kept:
    """Patterns as attributes: unlike a dictionary's items, tracing sees attributes added while it runs."""


_KEPT = _Kept()
_NAMES: dict[tuple, str] = {}


def on_grid(kind: type[P], grid: Grid, *options: Any) -> P:
    """Return `kind(grid, *options)`, the same object for the same arguments.

    Args:
        kind: a pattern whose first argument is the grid.
        grid: token geometry.
        options: the other arguments by position: numbers, strings, or tuples of them.

    Raises:
        ArgumentError: whatever `kind` refuses.
    """
    # `len(range(n))` is n; while tracing with sizes that vary it makes the size a constant of this graph.
    return getattr(_KEPT, _keep(kind, tuple(len(range(n)) for n in grid.sizes), options))


@constant_while_tracing
def _keep(kind: Any, sizes: Sequence[int], options: Sequence[Any]) -> str:
    key = (kind, tuple(sizes), *(tuple(o) if isinstance(o, list) else o for o in options))
    if key not in _NAMES:
        name = f"{kind.__name__}_{len(_NAMES)}"
        setattr(_KEPT, name, kind(Grid(*sizes), *options))
        _NAMES[key] = name
    return _NAMES[key]


def frozen(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return a per-axis option (integers or booleans) with its sequence, if it is one, as a tuple."""
    return value if isinstance(value, int) else tuple(value)
