"""`Pattern`: who may attend to whom, as index arithmetic. True always means "may attend".

A pattern has one definition, `allowed(q, k, n_q, n_k)`: elementwise integer arithmetic on broadcasting
tensors. The dense mask, FlexAttention's `mask_mod` and the partial cells of a Schedule all come from it. A
pattern that is a product over the axes of a grid also tells `axes()`, from which lowering gets closed forms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Entries of an N x N mask that `dense` computes at a time: bounds its int64 temporaries to some 100 MB.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Padded:
    """A zero-border pattern seen over the key grid that was padded so that phantoms become keys.

    Attributes:
        pattern: the same rule, over `grid.numel` queries and `key_grid.numel` keys; it has no phantoms.
        key_grid: the padded grid.
        lo: keys added before each axis. Key coordinates on the original axis are padded ones minus `lo`.
        hi: keys added after each axis.
    """

    pattern: Pattern
    key_grid: Grid
    lo: tuple[int, ...]
    hi: tuple[int, ...]

    @property
    def offset(self) -> tuple[int, ...]:
        """What to add to a padded key coordinate to get the coordinate on the original axis."""
        return tuple(-x for x in self.lo)


class Pattern:
    """Base of all static patterns. Immutable, hashable, equal by value; `eval(repr(p)) == p`.

    A subclass names its constructor arguments in `fields`, stores them with `_store` and defines `allowed`.
    """

    fields: tuple[str, ...] = ()

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Say elementwise whether query `q` may attend to key `k` (broadcasting ids within range)."""
        raise NotImplementedError

    @property
    def tokens(self) -> int | None:
        """Return the number of queries and keys when the pattern fixes it (a grid), else None."""
        return None

    @property
    def has_phantoms(self) -> bool:
        """Whether keys outside the grid take part as zeros (border="zero")."""
        return False

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError naming the length that this pattern cannot have."""
        check_length(n_q, "n_q")
        check_length(n_k, "n_k")

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...] | None:
        return None

    def axes(self, n_q: int | None = None, n_k: int | None = None) -> tuple[AxisRule, ...] | None:
        """Return one AxisRule per grid axis when `allowed` is their product over a row-major grid, else None.

        The query grid has sizes `rule.n_q`, the key grid `rule.n_k`. Tables live on the CPU and are cached.
        """
        return _cached_axes(self, *self.lengths(n_q, n_k))

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Return sorted key ids, at least all keys of the queries `q_ids`; generic lowering starts here."""
        axes = self.axes(n_q, n_k)
        if axes is None:
            return torch.arange(n_k)
        coords = Grid(*(max(a.n_q, 1) for a in axes)).unravel(q_ids.cpu())
        keys = None
        for axis, rule in enumerate(axes):
            ids = rule.keys_of(coords[axis].unique())
            keys = ids if keys is None else (keys[:, None] * rule.n_k + ids).flatten()
        assert keys is not None
        return keys

    @property
    def own_block(self) -> int | None:
        """Return the queries of a cell when the pattern brings cells of its own (`own_groups`), else None."""
        return None

    def own_groups(self, n_q: int, n_k: int) -> tuple[Any, ...]:
        """Return the cells of a pattern that brings its own, as CellGroups with every query in one cell at most."""
        raise NotImplementedError

    def lengths(self, n_q: int | None, n_k: int | None = None) -> tuple[int, int]:
        """Fill in the lengths a caller left out (`n_k` is `n_q`, `n_q` is the grid's) and check them.

        Raises:
            ArgumentError: if `n_q` is missing and no grid says it, or a length does not fit.
        """
        if n_q is None:
            n_q = self.tokens
        if n_q is None:
            raise bad("n_q", None, "the number of queries", f"{self!r} fits any length; say which.")
        n_k = self._default_n_k(n_q) if n_k is None else n_k
        self.check(n_q, n_k)
        return n_q, n_k

    def _default_n_k(self, n_q: int) -> int:
        return n_q

    def dense(
        self, n_q: int | None = None, n_k: int | None = None, *, device: torch.device | str | None = None
    ) -> Bool[Tensor, "n_q n_k"]:
        """Return the mask as a boolean matrix; True means query (row) may attend to key (column).

        Args:
            n_q: number of queries; may be left out when the pattern has a grid.
            n_k: number of keys, `n_q` by default.
            device: where the mask is made.

        Raises:
            ArgumentError: if the pattern does not fit these lengths.
        """
        n_q, n_k = self.lengths(n_q, n_k)
        q, k = torch.arange(n_q, device=device)[:, None], torch.arange(n_k, device=device)[None]
        rows = max(1, _CHUNK // max(n_k, 1))
        parts = [self.allowed(part, k, n_q, n_k).expand(len(part), n_k) for part in q.split(rows)]
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    @property
    def mask_mod(self) -> MaskMod:
        """The pattern as FlexAttention's `mask_mod(b, h, q, k)`, for as many keys as queries.

        For other lengths take `mask_mod_for(n_q, n_k)`.
        """
        # With n_q == n_k no pattern's arithmetic depends on the length, so that 0 stands for any.
        n = self.tokens or 0
        return self._mask_mod(n, n)

    def mask_mod_for(self, n_q: int, n_k: int) -> MaskMod:
        """Return FlexAttention's `mask_mod(b, h, q, k)` for `n_q` queries and `n_k` keys."""
        return self._mask_mod(*self.lengths(n_q, n_k))

    def _mask_mod(self, n_q: int, n_k: int) -> MaskMod:
        return lambda b, h, q, k: self.allowed(q, k, n_q, n_k)

    def phantoms(self, n_q: int | None = None) -> int:
        """Count the (query, phantom key) pairs of a zero border; `dense()` leaves them out."""
        self.lengths(n_q)
        return 0

    def padded(self) -> Padded | None:
        """Return the pattern over the padded key grid when it has phantoms, else None."""
        return None

    def draw(
        self, n_q: int | None = None, *, ax: Any = None, query: int | None = None, n_k: int | None = None
    ):
        """Draw the mask, or with `query=` the keys of one token on the grid, with matplotlib."""
        from foveate.patterns.draw import draw

        return draw(self, n_q, ax=ax, query=query, n_k=n_k)

    def draw_svg(
        self, n_q: int | None = None, *, query: int | None = None, n_k: int | None = None, size: int = 120
    ):
        """Return a small picture as an SVG string, without any dependency; arguments as `draw`."""
        from foveate.patterns.draw import draw_svg

        return draw_svg(self, n_q, query=query, n_k=n_k, size=size)

    def __and__(self, other):
        """Intersect: pairs that both patterns allow."""
        if not isinstance(other, Pattern):
            return NotImplemented
        from foveate.patterns.compose import intersection

        return intersection(self, other)

    def __or__(self, other):
        """Unite: pairs that either pattern allows."""
        if not isinstance(other, Pattern):
            return NotImplemented
        from foveate.patterns.compose import union

        return union(self, other)

    def __invert__(self) -> Pattern:
        """Complement: pairs the pattern does not allow."""
        from foveate.patterns.compose import complement

        return complement(self)

    def _store(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _key(self) -> object:
        return tuple(getattr(self, name) for name in self.fields)

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name):
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._key()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown_arguments())})"

    def _shown_arguments(self) -> list[str]:
        shown, named = [], False
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name not in self.fields:
                continue
            value = _short(getattr(self, name))
            if parameter.default is not parameter.empty and value == parameter.default:
                named = True
                continue
            shown.append(f"{name}={value!r}" if named else repr(value))
        return shown


def _short(value: object) -> object:
    """Show `(13, 13)` as `13`: what the user most likely wrote, and the constructor takes either."""
    if isinstance(value, tuple) and value and all(v == value[0] for v in value):
        return value[0]
    return value


def check_length(n: object, name: str) -> None:
    """Raise an ArgumentError naming `name` unless `n` is an integer >= 0."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise bad(name, n, "an integer >= 0")


def check_int(value: object, name: str, low: int) -> int:
    """Return `value` when it is an integer >= `low`; raise an ArgumentError naming `name` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise bad(name, value, f"an integer >= {low}")
    return value


@lru_cache(maxsize=32)
def _cached_axes(pattern: Pattern, n_q: int, n_k: int) -> tuple[AxisRule, ...] | None:
    return pattern._axes(n_q, n_k)
