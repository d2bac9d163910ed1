"""`Grid`: the geometry of tokens. N tokens are the cells of a 1-, 2- or 3-d grid, flattened row-major."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad


class Grid:
    """The sizes of a token grid, slowest axis first: `Grid(64, 64)` has 4096 tokens, row-major.

    Immutable, hashable, equal by value. Token `n` of `Grid(H, W)` sits in row `n // W`, column `n % W`.

    Raises:
        ArgumentError: if there are not 1 to 3 sizes, or one of them is not a positive integer.
    """

    __slots__ = ("sizes",)
    sizes: tuple[int, ...]

    def __init__(self, *sizes: int):
        if not 1 <= len(sizes) <= 3:
            raise bad("Grid", sizes, "1, 2 or 3 sizes")
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise bad("Grid", sizes, "positive integers")
        object.__setattr__(self, "sizes", tuple(int(s) for s in sizes))

    def __setattr__(self, name, value):
        raise AttributeError("Grid is immutable")

    def __reduce__(self):
        return Grid, self.sizes

    @classmethod
    def of(cls, value: Grid | int | Iterable[int]) -> Grid:
        """Accept what a user may write for a grid: a `Grid`, one size, or a sequence of sizes."""
        if isinstance(value, Grid):
            return value
        if isinstance(value, int):
            return cls(value)
        return cls(*value)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of tokens."""
        return math.prod(self.sizes)

    def coords(self, device=None) -> Int[Tensor, "n ndim"]:
        """Return the coordinates of every token, in token order."""
        axes = [torch.arange(s, device=device) for s in self.sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, self.ndim)

    def unravel(self, ids: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], ...]:
        """Split token ids into one coordinate tensor per axis."""
        out = []
        for size in reversed(self.sizes):
            out.append(ids % size)
            ids = ids // size
        return tuple(reversed(out))

    def ravel(self, coords: Iterable[Int[Tensor, "*shape"]]) -> Int[Tensor, "*shape"]:
        """Join per-axis coordinates (broadcastable tensors) into token ids; the inverse of `unravel`."""
        out = None
        for size, axis in zip(self.sizes, coords, strict=True):
            out = axis if out is None else out * size + axis
        assert out is not None
        return out

    def per_axis(self, value: int | Iterable[int], name: str) -> tuple[int, ...]:
        """Spread one integer, or check one integer per axis.

        Raises:
            ArgumentError: naming `name`, when the count is not `ndim` or an entry is not an integer.
        """
        values = (value,) * self.ndim if isinstance(value, int) else tuple(value)
        if len(values) != self.ndim or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise bad(name, value, f"one integer, or {self.ndim} integers for {self}")
        return values

    def check_tokens(self, n: int, name: str) -> None:
        """Raise an ArgumentError naming `name` unless the grid has exactly `n` tokens."""
        if n != self.numel:
            raise bad(
                name, n, f"{self.numel} tokens, the size of {self}", "The grid's sizes must multiply to N."
            )

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self) -> int:
        return self.ndim

    def __getitem__(self, axis: int) -> int:
        return self.sizes[axis]

    def __eq__(self, other) -> bool:
        return isinstance(other, Grid) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(("Grid", self.sizes))

    def __repr__(self) -> str:
        return f"Grid({', '.join(map(str, self.sizes))})"
