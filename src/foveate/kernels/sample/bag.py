"""`sample` as one weighted sum of table rows: every scalar factor goes into the weight of a pixel.

A value is sum_n w_n s_n V[n] over the pixels n around the position, w_n multi-linear, s_n the factor's value
there; times the point's weight it stays a sum over pixels. So the maps become one table (pixels, C), and one
embedding bag per query adds up its rows: no value is stored per point, only ids and scalars. torch's embedding
bag has one derivative and no second.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from foveate.kernels.sample.contract import SampleProblem, corners


def run(p: SampleProblem) -> Float[Tensor, "b m q *rest c"]:
    """Sum the rows around all points of a query, or of a point when there are no weights."""
    b, m, q, points, _ = p.pixels[0].shape
    maps = [level.flatten(3) for level in p.levels]
    table = (maps[0] if len(maps) == 1 else torch.cat(maps, dim=3)).transpose(2, 3)
    heads = torch.arange(b * m, device=table.device).reshape(b, m, 1, 1, 1) * table.shape[2]
    ids, shares, start = [], [], 0
    for index, level in enumerate(p.levels):
        near, share = corners(p.pixels[index][..., : p.ndim], tuple(reversed(level.shape[3:])))
        if p.factor is not None:
            share = share * depths(p.factor[index], near, p.pixels[index][..., p.ndim])
        if p.weights is not None:
            share = share * p.weights[:, :, :, index, :, None]
        ids.append(near + (heads + start))
        shares.append(share)
        start += maps[index].shape[3]
    # (B, M, Q, L, P, corners), cut into bags.
    bags = b * m * q * (len(p.levels) * points if p.weights is None else 1)
    joined, share = torch.stack(ids, dim=3), torch.stack(shares, dim=3)
    if joined.numel() == 0 or table.numel() == 0:
        # Nothing to add up; still a part of the graph.
        return table.new_zeros(p.shape) + 0 * (table.sum() + share.sum())
    width = joined.numel() // bags
    rows = table.reshape(-1, table.shape[3])
    out = embedding_bag(
        joined.reshape(bags, width), rows, mode="sum", per_sample_weights=share.reshape(bags, width)
    )
    return out.reshape(p.shape)


def depths(
    factor: Float[Tensor, "b h d *spatial"], near: Int[Tensor, "b m q p n"], depth: Float[Tensor, "b m q p"]
) -> Float[Tensor, "b m q p n"]:
    """Return the factor at the pixels `near`, linear between the two bins around `depth`, 0 beyond the ends."""
    heads, bins = factor.shape[1:3]
    flat = factor.flatten(2)
    size = flat.shape[2] // bins
    ids, shares = corners(depth.unsqueeze(-1), (bins,))
    both = ids.unsqueeze(-2) * size + near.unsqueeze(-1)
    # Heads that share a factor are more queries of one head: nothing is copied.
    index = both.flatten(2) if heads > 1 else both.flatten(1).unsqueeze(1)
    found = flat.gather(2, index).reshape(both.shape)
    return (found * shares.unsqueeze(-2)).sum(-1)
