"""The checks every mechanism makes on what it is given, so that all of them refuse alike."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid

T = TypeVar("T", int, bool)


def check_heads(dim: int, heads: int) -> int:
    """Return the head width `dim // heads`.

    Raises:
        ArgumentError: naming `heads` or `dim`, when they are not positive or do not divide.
    """
    for name, value in (("dim", dim), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad(name, value, "a positive integer")
    if dim % heads:
        raise bad("dim", dim, f"a multiple of heads={heads}")
    return dim // heads


def frozen(value: T | Sequence[T]) -> T | tuple[T, ...]:
    """Return a per-axis option (integers or booleans) with its sequence, if it is one, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) else value


def check_tokens(x: Tensor, grid: Grid | None, dim: int, dims: Iterable[int] = (1, 2, 3)) -> None:
    """Check the input of a token mechanism: `x` (B, N, C) with N the size of `grid` and C = `dim`.

    Raises:
        ArgumentError: naming `x` or `grid`.
    """
    if not isinstance(grid, Grid):
        raise bad("grid", grid, "a Grid", "Write Grid(64, 64), or Grid(n) for a sequence.")
    if grid.ndim not in tuple(dims):
        raise bad("grid", grid, f"a grid with {_either(dims)} axes")
    if x.dim() != 3:
        raise bad("x", tuple(x.shape), "three axes, (batch, tokens, channels)")
    accumulation_dtype(x.dtype)
    if x.shape[2] != dim:
        raise bad("x", tuple(x.shape), f"{dim} channels on the last axis")
    grid.check_tokens(x.shape[1], "x")


def check_spatial(x: Tensor, dim: int, dims: Iterable[int] = (2,)) -> None:
    """Check the input of a spatial gate: `x` (B, C, *spatial) with C = `dim`.

    Raises:
        ArgumentError: naming `x`.
    """
    if x.dim() - 2 not in tuple(dims):
        raise bad("x", tuple(x.shape), f"(batch, channels, *spatial) with {_either(dims)} spatial axes")
    accumulation_dtype(x.dtype)
    if x.shape[1] != dim:
        raise bad("x", tuple(x.shape), f"{dim} channels on axis 1")


def refuse_causal(causal: bool, reason: str) -> None:
    """Raise an ArgumentError with the `reason` when a causal form is asked of a mechanism that has none."""
    if causal:
        raise bad("causal", causal, "False", f"Not causal: {reason}.")


def _either(dims: Iterable[int]) -> str:
    return " or ".join(map(str, dims))
