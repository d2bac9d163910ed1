"""Apportionment: whole items handed out in proportion to shares, query heads to key heads for one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.tracing import run_eagerly


@run_eagerly
def apportion(
    shares: Float[Tensor, "g"],
    total: int,
    *,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "g"]:
    """Round `shares / sum(shares) * total` to integers that add up to `total`.

    What rounding leaves too many is taken from the largest, what is missing is given to the smallest, one at a time
    and the first among equals. Reads the shares from the device.

    Args:
        shares: numbers >= 0. All zero, or not finite: everybody gets the same, the first ones what is left over.
        total: items.
        random: take and give at random places instead, never below zero.
        generator: of the random places; the global one by default.

    Returns:
        int64 counts >= 0 on the device of the shares.

    Raises:
        ArgumentError: naming `shares` or `total`.
    """
    if shares.ndim != 1 or not len(shares) or not shares.is_floating_point():
        raise bad(
            "shares", f"{shares.dtype} of shape {tuple(shares.shape)}", "a float vector, not an empty one"
        )
    if isinstance(total, bool) or not isinstance(total, int) or total < 0:
        raise bad("total", total, "an integer >= 0")
    shares = shares.detach()
    whole = shares.sum()
    if not (whole.isfinite() and whole > 0):
        shares, whole = torch.ones_like(shares), torch.full_like(whole, len(shares))
    counts: list[int] = (shares / whole * total).round().long().tolist()
    if min(counts) < 0:
        raise bad("shares", shares.tolist(), "numbers >= 0")
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        if random:
            at = int(torch.randint(len(counts), (1,), generator=generator))
            if step < 0 and counts[at] == 0:
                continue
        else:
            at = counts.index(min(counts) if step > 0 else max(counts))
        counts[at] += step
    return torch.tensor(counts, device=shares.device)
