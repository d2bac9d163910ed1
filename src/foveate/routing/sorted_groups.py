"""Groups of tokens that lie next to one another after sorting, each attending to itself and the next ones."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.selection import Selection


def sorted_groups(
    order: Int[Tensor, "b n"] | Int[Tensor, "b h n"], size: int, *, after: int = 1, reflect: bool = False
) -> Selection:
    """Return the selection in which `size` consecutive tokens of an order see themselves and what follows.

    Queries are cut into groups of `size` (the last one may be smaller). A group's keys are its own tokens and
    those of the `after` groups behind it. At the end of the order the window of keys is moved inside, so that
    every group sees `(1 + after) * size` different keys, or all there are.

    Args:
        order: token ids, sorted by whatever brings tokens together that should meet.
        size: tokens of a group.
        after: groups seen behind one's own.
        reflect: fill windows that reach beyond the end with the mirror image of the order instead: its last
            tokens once more, backwards. Keys that occur twice count twice (cells combine by "sum" then).

    Raises:
        ArgumentError: naming `order`, `size`, `after`, or `size` when the order is too short to be reflected.
    """
    if order.ndim not in (2, 3) or order.dtype != torch.int64:
        raise bad("order", f"{order.dtype} of shape {tuple(order.shape)}", "int64 ids (B, N) or (B, H, N)")
    if size < 1:
        raise bad("size", size, "a positive number of tokens")
    if after < 0:
        raise bad("after", after, "a number of groups >= 0")
    lines = order[:, None] if order.ndim == 2 else order
    n = lines.shape[2]
    size = min(size, max(n, 1))
    count, width = -(-n // size), (1 + after) * size
    first = torch.arange(count, device=order.device)[:, None] * size
    at_q = first + torch.arange(size, device=order.device)
    if reflect:
        at_k = first + torch.arange(width, device=order.device)
        beyond = (count + after) * size - n
        if beyond > n:
            hint = "Make groups smaller, or leave the reflection out."
            raise bad("size", size, f"groups whose {beyond} missing tokens a mirror of {n} can fill", hint)
        at_k = torch.where(at_k < n, at_k, 2 * n - 1 - at_k)
    else:
        width = min(width, n)
        at_k = first.clamp(max=n - width) + torch.arange(width, device=order.device)
    q_ids = lines[..., at_q.clamp(max=max(n - 1, 0))].masked_fill(at_q >= n, -1)
    return Selection(q_ids, lines[..., at_k], n_q=n, n_k=n, combine="sum" if reflect else "lse")
