"""The largest entries of each row as a mask: a threshold between them and the others, found by counting.

`topk` moves numbers about and lists places. Where a large share of a row is taken, and a mask is what is wanted, it is
several times cheaper to look for a number that exactly so many entries exceed. Counting takes one pass over a row; a
guess from mean and deviation and false position between counts find the number in about five of them.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad

# Passes after which rows are left to `topk`: those whose last and next entry are equal never end.
_PASSES = 14
# Share of the rows that is left to `topk` too: passes over few rows cost as much as over some more.
_FEW = 1 / 48


@torch.no_grad()
def largest_mask(x: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """Return, for each row, True for the `count` largest entries; among equal ones any. No gradient.

    Entries of -inf are never taken: rows with fewer others are True for all of these.

    Args:
        x: rows, without NaN.
        count: how many are taken.

    Raises:
        ArgumentError: naming `count`, unless it is between 1 and the entries of a row.
    """
    n = x.shape[1]
    if not 1 <= count <= n:
        raise bad("count", count, f"between 1 and the {n} entries of a row")
    x = x.to(accumulation_dtype(x.dtype))
    if count == n:
        return x > float("-inf")
    if x.device.type != "cpu" or n >= 1 << 24 or torch.compiler.is_compiling():
        return _by_topk(x, count)  # every pass would wait for the device; counts are exact up to 2^24
    cut = _cuts(x, count)
    mask = x > cut
    left = cut.isnan().squeeze(-1)
    if bool(left.any()):
        mask[left] = _by_topk(x[left], count)
    return mask


def _by_topk(x: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    top = x.topk(count, dim=-1, sorted=False)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, top.indices, ~top.values.isneginf())


def _cuts(x: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows 1"]:
    """Return a number for each row that exactly `count` entries exceed, NaN where none was found."""
    (rows, n), device = x.shape, x.device
    # Counts are sums of a float 1 for each entry, which the vector units are fastest at, and exact.
    cuts = torch.full((rows, 1), float("nan"), dtype=x.dtype, device=device)
    at = torch.arange(rows, device=device)
    ones = torch.empty(x.shape, dtype=torch.float32, device=device)
    guess, slope = _first_guess(x, count)
    # More than `count` entries exceed `low`, and fewer exceed `high`; by how many, or less (see below).
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    above, below = torch.full_like(low, n - count), torch.full_like(low, count)
    raised = torch.zeros_like(low, dtype=torch.bool)
    for step in range(_PASSES):
        over = torch.gt(x, guess, out=ones).sum(-1, keepdim=True) - count
        done = over == 0
        cuts[at] = torch.where(done, guess, cuts[at])
        more, less = over > 0, over < 0
        low, high = torch.where(more, guess, low), torch.where(less, guess, high)
        if step > 1:
            # False position gets stuck at one end; the Illinois rule halves the other end's weight then.
            above = torch.where(less & ~raised, above * 0.5, above)
            below = torch.where(more & raised, below * 0.5, below)
        above, below = torch.where(more, over, above), torch.where(less, -over, below)
        raised = more
        if step == 0:  # a little further than the density says, to get to the other side
            guess = guess + slope * (over + 8 * over.sign())
        else:
            guess = low + (high - low) * (above / (above + below))
        left = (~done & guess.isfinite()).squeeze(-1)  # nothing can be guessed where there is -inf
        remain = int(left.sum())
        if remain <= rows * _FEW:
            break
        if 2 * remain <= len(at):
            keep = left.nonzero().squeeze(-1)
            at, x, guess, low, high = (y[keep] for y in (at, x, guess, low, high))
            above, below, raised, ones = above[keep], below[keep], raised[keep], ones[: len(keep)]
    return cuts


def _first_guess(x: Float[Tensor, "rows n"], count: int) -> tuple[Tensor, Tensor]:
    """Return where the cut would be in a normal distribution, and how far to go there to pass one entry."""
    n, normal = x.shape[1], NormalDist()
    z = normal.inv_cdf(1 - count / n)
    mean = x.mean(-1, keepdim=True)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / n
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return mean + z * deviation, 1.3 * deviation / (n * normal.pdf(z))
