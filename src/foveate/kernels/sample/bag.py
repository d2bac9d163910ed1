"""`sample` as one weighted sum of table rows: every scalar factor goes into the weight of a pixel.

A value is sum_n w_n s_n V[n] over the pixels n around the position, w_n multi-linear, s_n the factor's value
there; times the point's weight it stays a sum over pixels. So the maps become one table (pixels, C), and one
embedding bag per query adds up its rows: no value is stored per point, only ids and scalars. Large problems
are done piece by piece, and what a piece needs for its gradient is computed again then, so that never more
than one piece of ids and scalars is alive. torch's embedding bag has one derivative and no second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint

from foveate.kernels.sample.contract import SampleProblem, corners

# Pixels read in one piece: as fast as all at once (a smaller piece is slower), with a bounded memory.
PIECE = 2**18
SAMPLES, HEADS, QUERIES, DONE = range(4)


def run(p: SampleProblem) -> Float[Tensor, "b m q *rest c"]:
    """Sum the rows around all points of a query, or of a point when there are no weights."""
    maps = [level.flatten(3) for level in p.levels]
    table = (maps[0] if len(maps) == 1 else torch.cat(maps, dim=3)).transpose(2, 3)
    sizes = tuple(tuple(reversed(level.shape[3:])) for level in p.levels)
    part = Part(sizes, table, p.pixels, p.weights, p.factor or ())
    if part.reads == 0 or table.numel() == 0:
        # Nothing to add up; still a part of the graph.
        return table.new_zeros(p.shape) + 0 * sum(x.sum() for x in part.tensors)
    return _in_pieces(part, SAMPLES).reshape(p.shape)


class Part(NamedTuple):
    """Some samples, heads and queries of a problem.

    Attributes:
        sizes: of the maps, x first.
        table: (B, M, pixels of all levels, C).
        pixels, weights, factor: as in `SampleProblem`.
    """

    sizes: tuple[tuple[int, ...], ...]
    table: Tensor
    pixels: tuple[Tensor, ...]
    weights: Tensor | None
    factor: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that may want a gradient."""
        return (self.table, *self.pixels, *(() if self.weights is None else (self.weights,)), *self.factor)

    @property
    def reads(self) -> int:
        """Pixels (with a factor: bins of pixels) that are read."""
        return sum(x.numel() // x.shape[-1] * 2 ** x.shape[-1] for x in self.pixels)

    def split(self, axis: int) -> Iterator[Part]:
        """Cut along samples, heads or queries into parts of about one piece each, at least one row."""
        rows = self.pixels[0].shape[axis]
        step = max(1, rows * PIECE // self.reads)
        count = math.ceil(rows / step)

        def cut(x: Tensor, has_axis: bool = True) -> tuple[Tensor, ...]:
            return x.split(step, axis) if has_axis else (x,) * count

        # What is shared by all heads or queries goes into every part.
        per_row = axis != QUERIES
        tables = cut(self.table, per_row)
        pixels = zip(*(cut(x) for x in self.pixels), strict=True)
        weights = (None,) * count if self.weights is None else cut(self.weights)
        shared = (cut(f, per_row and (axis == SAMPLES or f.shape[HEADS] > 1)) for f in self.factor)
        factors = zip(*shared, strict=True) if self.factor else ((),) * count
        for table, at, weight, factor in zip(tables, pixels, weights, factors, strict=True):
            yield Part(self.sizes, table, at, weight, factor)


def _in_pieces(part: Part, axis: int) -> Float[Tensor, "b m q _"]:
    if part.reads <= PIECE or axis == DONE:
        if axis == SAMPLES or not torch.is_grad_enabled():
            return _sum(*part)
        return checkpoint(_sum, *part, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([_in_pieces(piece, axis + 1) for piece in part.split(axis)], dim=axis)


def _sum(
    sizes: tuple[tuple[int, ...], ...],
    table: Float[Tensor, "b m rows c"],
    pixels: tuple[Tensor, ...],
    weights: Tensor | None,
    factor: tuple[Tensor, ...],
) -> Float[Tensor, "b m q _"]:
    """One embedding bag per query, or per point; the last axis of the result is (L, P, C) then."""
    b, m, _, c = table.shape
    q, points, _ = pixels[0].shape[2:]
    start = torch.arange(b * m, device=table.device).reshape(b, m, 1, 1, 1) * table.shape[2]
    ids, shares = [], []
    for index, size in enumerate(sizes):
        near, share = corners(pixels[index][..., : len(size)], size)
        if factor:
            share = share * depths(factor[index], near, pixels[index][..., -1])
        if weights is not None:
            share = share * weights[:, :, :, index, :, None]
        ids.append(near + start)
        shares.append(share)
        start = start + math.prod(size)
    # (B, M, Q, L, P, corners), cut into bags.
    bags = b * m * q * (len(sizes) * points if weights is None else 1)
    ids, shares = torch.stack(ids, dim=3).reshape(bags, -1), torch.stack(shares, dim=3).reshape(bags, -1)
    out = embedding_bag(ids, table.reshape(-1, c), mode="sum", per_sample_weights=shares)
    return out.reshape(b, m, q, -1)


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
