"""Small integer-array helpers that lowering and transposing share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

# Up to this many distinct cell shapes are kept as they are; more are rounded up to few.
FEW_SHAPES = 8


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Hash integers to well-mixed 64-bit ones (the finaliser of splitmix64; overflow is wanted)."""
    x = (x + 1) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def unique_rows(rows: Int[Tensor, "n w"]) -> tuple[Int[Tensor, "u"], Int[Tensor, "n"]]:
    """Return (representatives, label of every row); labels count up in order of first appearance.

    `torch.unique(dim=0)` sorts whole rows; hashing them first is much faster. Equal hashes are verified.
    """
    n, width = rows.shape
    if n <= 1:
        return torch.arange(n), torch.zeros(n, dtype=torch.int64)
    _, label = ((rows + 1) * (mix(torch.arange(width)) | 1)).sum(1).unique(return_inverse=True)
    representatives = _first_of(label)
    if not torch.equal(rows[representatives][label], rows):
        _, label = rows.unique(dim=0, return_inverse=True)
        representatives = _first_of(label)
    by_appearance = representatives.argsort()
    return representatives[by_appearance], by_appearance.argsort()[label]


def _first_of(label: Tensor) -> Tensor:
    """Return, for every label, the first position that carries it."""
    first = torch.full((int(label.max()) + 1,), label.numel())
    return first.scatter_reduce_(0, label, torch.arange(label.numel()), "amin")


def starts_of(sizes: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Return where each of consecutive pieces of the given sizes begins."""
    return sizes.cumsum(0) - sizes


def few_sizes(sizes: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Round sizes up to three leading bits (25% more at most) when there are many different ones."""
    if sizes.numel() == 0 or sizes.unique().numel() <= FEW_SHAPES:
        return sizes
    grain = torch.tensor([1 << max(int(s).bit_length() - 3, 0) for s in sizes.tolist()])
    return (sizes + grain - 1) // grain * grain


def broadcast_leading(shapes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Return the (b, h) that all the (b, h) broadcast to, None when they don't.

    `torch.broadcast_shapes` does the same, but imports a computer algebra system first: over a second.
    """
    out = [1, 1]
    for shape in shapes:
        for side, size in enumerate(shape):
            if size != 1 and out[side] not in (1, size):
                return None
            out[side] = size if size != 1 else out[side]
    return out[0], out[1]
