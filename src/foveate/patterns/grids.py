"""Patterns on a grid: neighborhoods, windows, halos and the lattice. Products of one `LocalAxis` per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.patterns.axis import BORDERS, AxisRule, Border, LocalAxis
from foveate.patterns.pattern import Padded, Pattern

GridLike = Grid | int | Sequence[int]
PerAxis = int | Sequence[int]


class GridPattern(Pattern):
    """A product of `LocalAxis` rules over a row-major grid; queries and keys are the same tokens."""

    grid: Grid
    local: tuple[LocalAxis, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of the grid."""
        return self.grid.numel

    @property
    def has_phantoms(self) -> bool:
        """Whether an axis has border="zero"."""
        return any(axis.border == "zero" for axis in self.local)

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless both lengths are the grid's; there is no cross form."""
        super().check(n_q, n_k)
        self.grid.check_tokens(n_q, "n_q")
        self.grid.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """AND of the axes."""
        coords = zip(self.local, self.grid.unravel(q), self.grid.unravel(k), self.grid, strict=True)
        parts = [axis.allowed(i, j, length) for axis, i, j, length in coords]
        return _all(parts)

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return tuple(axis.rule(length, length) for axis, length in zip(self.local, self.grid, strict=True))

    def phantoms(self, n_q: int | None = None) -> int:
        """Count (query, phantom key) pairs: all pairs over the padded grid minus the real ones."""
        self.lengths(n_q)
        if not self.has_phantoms:
            return 0
        pairs = list(zip(self.local, self.grid, strict=True))
        every = math.prod(axis.padded_rule(length).pairs for axis, length in pairs)
        return every - math.prod(axis.rule(length, length).pairs for axis, length in pairs)

    def padded(self) -> Padded | None:
        """Return the pattern over the zero-padded key grid, or None when nothing is padded by design."""
        if not self.has_phantoms:
            return None
        both = [axis.padding(length) for axis, length in zip(self.local, self.grid, strict=True)]
        lo, hi = tuple(low for low, _ in both), tuple(high for _, high in both)
        pattern = PaddedGrid(self.grid, self.local)
        return Padded(pattern=pattern, key_grid=pattern.key_grid, lo=lo, hi=hi)


class PaddedGrid(Pattern):
    """A zero-border grid pattern over its padded key grid, where phantoms are ordinary keys.

    Made by `padded()`. `grid.numel` queries, `key_grid.numel` keys.
    """

    fields = ("grid", "local")
    grid: Grid
    local: tuple[LocalAxis, ...]
    key_grid: Grid
    _lo: tuple[int, ...]

    def __init__(self, grid: GridLike, local: Sequence[LocalAxis]):
        grid, local = Grid.of(grid), tuple(local)
        padding = tuple(axis.padding(length) for axis, length in zip(local, grid, strict=True))
        key_grid = Grid(*(length + sum(pad) for length, pad in zip(grid, padding, strict=True)))
        self._store(grid=grid, local=local, key_grid=key_grid, _lo=tuple(low for low, _ in padding))

    @property
    def tokens(self) -> int:
        """The number of queries; there are more keys."""
        return self.grid.numel

    def _default_n_k(self, n_q: int) -> int:
        return self.key_grid.numel

    def _shown_arguments(self) -> list[str]:
        return [repr(self.grid), repr(self.local)]

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless `n_q` is the grid's size and `n_k` the padded one's."""
        super().check(n_q, n_k)
        self.grid.check_tokens(n_q, "n_q")
        self.key_grid.check_tokens(n_k, "n_k")

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """AND of the axes, at key coordinates of the original grid (negative before it)."""
        at_q, at_k = self.grid.unravel(q), self.key_grid.unravel(k)
        coords = zip(self.local, at_q, at_k, self._lo, self.grid, strict=True)
        return _all([axis.allowed(i, j - low, length) for axis, i, j, low, length in coords])

    def _axes(self, n_q: int, n_k: int) -> tuple[AxisRule, ...]:
        return tuple(axis.padded_rule(length) for axis, length in zip(self.local, self.grid, strict=True))


class Neighborhood(GridPattern):
    """Each token attends to the `window` tokens nearest to it along every axis; windows never leave the grid.

    NATTEN's definition (arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922). Along an axis, inside the
    dilation group of the token (the positions congruent to it modulo `dilation`): `stride` consecutive tokens
    share the window of their leader, an even window reaches one further to the left, and at the border the
    window is moved inside, so that it always has exactly `window` keys. A causal axis sees the window that
    ends at the last token of its stride group, cut off after the query: 1 to `window` keys.

    Args:
        grid: token geometry, a `Grid` or its sizes.
        window: keys per axis, >= 1.
        dilation: distance between neighbouring keys, per axis; `dilation * window` must fit the axis.
        stride: tokens that share a window, per axis, between 1 and `window`.
        causal: per axis, whether keys after the query are left out.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    fields = ("grid", "window", "dilation", "stride", "causal")
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]

    def __init__(
        self,
        grid: GridLike,
        window: PerAxis,
        dilation: PerAxis = 1,
        stride: PerAxis = 1,
        causal: bool | Sequence[bool] = False,
    ):
        grid = Grid.of(grid)
        windows = _per_axis(grid, window, "window", 1)
        dilations = _per_axis(grid, dilation, "dilation", 1)
        strides = _per_axis(grid, stride, "stride", 1)
        causals = _bools(grid, causal, "causal")
        local = []
        for length, w, d, s, c in zip(grid, windows, dilations, strides, causals, strict=True):
            if w > length:
                raise bad("window", window, f"at most {length} on an axis of {grid}", "Use a smaller window.")
            if w * d > length:
                raise bad(
                    "dilation",
                    dilation,
                    f"dilation * window <= {length} on an axis of {grid} (window {w})",
                    f"The largest dilation is {length // w}.",
                )
            if s > w:
                raise bad("stride", stride, f"at most the window, {w}", "Larger strides would skip keys.")
            # The leader is right of centre for even strides, the window left of centre for even sizes.
            offset = s - w if c else s // 2 - w // 2
            local.append(LocalAxis(w, offset, group=s, dilation=d, border="clamp", causal=c))
        self._store(grid=grid, window=windows, dilation=dilations, stride=strides, causal=causals)
        self._store(local=tuple(local))


class Windows(GridPattern):
    """Tokens attend inside non-overlapping windows, moved by `shift` (Swin, arXiv 2103.14030).

    Along each axis the windows are [0, shift), [shift, shift + size), ...: what Swin's cyclic shift and its
    mask amount to, as regions that were wrapped around do not mix. The last window is smaller when sizes
    don't divide.

    Args:
        grid: token geometry.
        size: window size per axis, at most the axis.
        shift: per axis, 0 <= shift < size.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    fields = ("grid", "size", "shift")
    size: tuple[int, ...]
    shift: tuple[int, ...]

    def __init__(self, grid: GridLike, size: PerAxis, shift: PerAxis = 0):
        grid = Grid.of(grid)
        sizes, shifts = _per_axis(grid, size, "size", 1), _per_axis(grid, shift, "shift", 0)
        local = []
        for length, m, s in zip(grid, sizes, shifts, strict=True):
            if m > length:
                raise bad("size", size, f"at most {length} on an axis of {grid}", "Use a smaller window.")
            if s >= m:
                raise bad("shift", shift, f"less than the window size, {m}", f"Use shift % {m}.")
            local.append(LocalAxis(m, 0, group=m, origin=s))
        self._store(grid=grid, size=sizes, shift=shifts, local=tuple(local))


class Halo(GridPattern):
    """Blocks of queries attend to their block and a halo around it (HaloNet, arXiv 2103.12731).

    Along each axis the queries [n*block, (n+1)*block) see the keys [n*block - halo, (n+1)*block + halo).

    Args:
        grid: token geometry. A last block that is cut off by the border keeps its whole window.
        block: queries of a block, per axis, at most the axis.
        halo: keys added on each side, per axis, >= 0.
        border: "mask": keys outside do not exist; "clamp": the window is moved inside; "zero": phantom keys
            with k = v = 0 that count in the denominator (as published), see `phantoms` and `padded`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    fields = ("grid", "block", "halo", "border")
    block: tuple[int, ...]
    halo: tuple[int, ...]
    border: Border

    def __init__(self, grid: GridLike, block: PerAxis, halo: PerAxis, border: Border = "mask"):
        grid = Grid.of(grid)
        blocks, halos = _per_axis(grid, block, "block", 1), _per_axis(grid, halo, "halo", 0)
        if border not in BORDERS:
            raise bad("border", border, "one of 'mask', 'clamp', 'zero'")
        local = []
        for length, b, h in zip(grid, blocks, halos, strict=True):
            if b > length:
                raise bad("block", block, f"at most {length} on an axis of {grid}", "Use a smaller block.")
            if border == "clamp" and b + 2 * h > length:
                raise bad(
                    "halo",
                    halo,
                    f"block + 2 * halo <= {length} on an axis of {grid} when border='clamp'",
                    "Use a smaller halo, or border='mask'.",
                )
            local.append(LocalAxis(b + 2 * h, -h, group=b, border=border))
        self._store(grid=grid, block=blocks, halo=halos, border=border, local=tuple(local))


class Lattice(GridPattern):
    """Tokens attend to `size` points per axis spread over the whole grid (MaxViT, arXiv 2204.01697).

    Along an axis of length L, tokens with the same offset `i % (L // size)` see one another.

    Args:
        grid: token geometry.
        size: points per axis; must divide the axis.

    Raises:
        ArgumentError: naming `size` when it does not divide an axis.
    """

    fields = ("grid", "size")
    size: tuple[int, ...]

    def __init__(self, grid: GridLike, size: PerAxis):
        grid = Grid.of(grid)
        sizes = _per_axis(grid, size, "size", 1)
        local = []
        for length, m in zip(grid, sizes, strict=True):
            if length % m:
                divisors = [d for d in range(1, length + 1) if length % d == 0]
                near = min(divisors, key=lambda d: abs(d - m))
                raise bad(
                    "size", size, f"a divisor of {length}, an axis of {grid}", f"The nearest is {near}."
                )
            local.append(LocalAxis(m, 0, group=m, dilation=length // m))
        self._store(grid=grid, size=sizes, local=tuple(local))


def _all(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out


def _per_axis(grid: Grid, value: PerAxis, name: str, low: int) -> tuple[int, ...]:
    """Spread or check one integer per axis, each >= `low`."""
    if not isinstance(value, int | Sequence) or isinstance(value, str):
        raise bad(name, value, f"one integer, or {grid.ndim} integers for {grid}")
    values = grid.per_axis(value, name)
    if min(values) < low:
        raise bad(name, value, f"integers >= {low}")
    return values


def _bools(grid: Grid, value: bool | Sequence[bool], name: str) -> tuple[bool, ...]:
    """Spread or check one boolean per axis."""
    values = (value,) * grid.ndim if isinstance(value, bool) else value
    if (
        not isinstance(values, Sequence)
        or len(values) != grid.ndim
        or not all(isinstance(v, bool) for v in values)
    ):
        raise bad(name, value, f"one boolean, or {grid.ndim} booleans for {grid}")
    return tuple(values)
