"""Grouped-query attention whose groups differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.attend import attend


def attend_uneven(
    q: Float[Tensor, "#b h n_q d"],
    k: Float[Tensor, "#b h_kv n_k d"],
    v: Float[Tensor, "#b h_kv n_k e"],
    sizes: Sequence[int] | Int[Tensor, "h_kv"],
    *,
    where: Any = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend with `sizes[g]` consecutive query heads per key head g.

    Key heads whose groups have one size are attended to in one call, each key head once: no copy of k and v where
    all sizes are equal, otherwise one of what is used, and as many calls as there are different sizes. Repeating k
    and v for every query head would be one call and H / H_kv times the keys and values.

    Args:
        q, k, v: as for `attend`, but H_kv need not divide H.
        sizes: query heads of each key head; they add up to H, and a key head may have none. A tensor is read from
            its device, except in compiled code, where k and v are repeated instead.
        where: who sees whom, the same for all heads.
        scale, backend: as for `attend`.

    Raises:
        ArgumentError: naming `sizes`, unless it has one number per key head and they add up to H.
    """
    heads, groups = q.shape[1], k.shape[1]
    options = {"where": where, "scale": scale, "backend": backend}
    if len(sizes) != groups:
        raise bad("sizes", len(sizes), f"{groups} numbers, one per key head")
    if isinstance(sizes, Tensor):
        if torch.compiler.is_compiling():
            at = torch.repeat_interleave(torch.arange(groups, device=q.device), sizes, output_size=heads)
            return attend(q, k[:, at], v[:, at], **options)
        sizes = sizes.tolist()
    if min(sizes, default=0) < 0 or sum(sizes) != heads:
        raise bad("sizes", tuple(sizes), f"numbers >= 0 that add up to the {heads} heads of q")
    if len(set(sizes)) == 1:
        return attend(q, k, v, **options)
    blocks = q.split(list(sizes), dim=1)
    outs: list[Tensor | None] = [None] * groups
    for size in sorted(set(sizes) - {0}):
        mine = [g for g in range(groups) if sizes[g] == size]
        keys, values = (torch.stack([t[:, g] for g in mine], dim=1) for t in (k, v))
        out = attend(torch.cat([blocks[g] for g in mine], dim=1), keys, values, **options)
        for g, part in zip(mine, out.split(size, dim=1), strict=True):
            outs[g] = part
    return torch.cat([out for out in outs if out is not None], dim=1)
