"""`linear_form`: prove that a function of coordinates is linear by feeding it symbols that only add and scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from foveate.core.errors import FoveateError


class NotLinearError(FoveateError):
    """A symbol was asked for something that is no sum and no product with an integer."""


class Linear:
    """An integer form `q . query coordinates + k . key coordinates + constant`.

    Any operation that would leave the linear forms raises, so that a function which maps symbols to a `Linear`
    equals that form everywhere.
    """

    __slots__ = ("constant", "k", "q")

    def __init__(self, q: tuple[int, ...], k: tuple[int, ...], constant: int = 0):
        self.q, self.k, self.constant = q, k, constant

    def _map(self, other: Any, a: int, b: int) -> Linear:
        """Return a * self + b * other."""
        if isinstance(other, int) and not isinstance(other, bool):
            other = Linear((0,) * len(self.q), (0,) * len(self.k), other)
        if not isinstance(other, Linear):
            raise NotLinearError
        q, k = (
            tuple(a * x + b * y for x, y in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.q, other.q), (self.k, other.k))
        )
        return Linear(q, k, a * self.constant + b * other.constant)

    def __add__(self, other: Any) -> Linear:
        return self._map(other, 1, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Linear:
        return self._map(other, 1, -1)

    def __rsub__(self, other: Any) -> Linear:
        return self._map(other, -1, 1)

    def __neg__(self) -> Linear:
        return self._map(0, -1, 0)

    def __pos__(self) -> Linear:
        return self

    def __mul__(self, other: Any) -> Linear:
        if not isinstance(other, int) or isinstance(other, bool):
            raise NotLinearError
        return self._map(0, other, 0)

    __rmul__ = __mul__

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotLinearError

    # Comparisons and truth would let a function branch on a symbol; conversions would let it leave as a number.
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __int__ = __index__ = __float__ = __len__ = __iter__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def range(self, q_sizes: tuple[int, ...], k_sizes: tuple[int, ...]) -> tuple[int, int]:
        """Return the least and the greatest value over all coordinates of two grids."""
        low = high = self.constant
        for weight, size in (*zip(self.q, q_sizes, strict=True), *zip(self.k, k_sizes, strict=True)):
            low += min(weight * (size - 1), 0)
            high += max(weight * (size - 1), 0)
        return low, high

    def shifted_keys(self, low: tuple[int, ...]) -> Linear:
        """Return the form for key coordinates that are greater by `low`."""
        return Linear(self.q, self.k, self.constant - sum(a * b for a, b in zip(self.k, low, strict=True)))

    def slopes(self) -> tuple[int, ...]:
        """Return the s of every axis for which the form counts k - s q there, rounded down."""
        return tuple(-q // k if k else 0 for q, k in zip(self.q, self.k, strict=True))

    def range_within(
        self, q_sizes: tuple[int, ...], k_sizes: tuple[int, ...], offsets: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        """Return the same over the pairs whose k - s q (s of `slopes`) lies in `offsets` (both ends included)."""
        low = high = self.constant
        for q, k, s, n_q, n_k, ends in zip(
            self.q, self.k, self.slopes(), q_sizes, k_sizes, offsets, strict=True
        ):
            # q q_i + k k_i = k (k_i - s q_i) + (q + s k) q_i, and the bracket is 0 wherever s is exact.
            rest = (q + s * k) * (n_q - 1)
            near = sorted(k * end for end in ends)
            box = Linear((q,), (k,)).range((n_q,), (n_k,))
            low += max(near[0] + min(rest, 0), box[0])
            high += min(near[1] + max(rest, 0), box[1])
        return low, high


def linear_form(f: Callable[..., Any], axes: int) -> Linear | None:
    """Return `f(query coordinates, key coordinates)` as a form, None when it is not proved linear."""
    none = (0,) * axes
    unit = [tuple(int(i == axis) for i in range(axes)) for axis in range(axes)]
    try:
        form = f(tuple(Linear(u, none) for u in unit), tuple(Linear(none, u) for u in unit))
    except Exception:  # whatever it does with symbols, it is not the arithmetic that proves it linear
        return None
    if isinstance(form, int) and not isinstance(form, bool):
        form = Linear(none, none, form)
    return form if isinstance(form, Linear) else None
