"""Cells whose masks are words already, flattened by array operations: the table of pairs is never made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from foveate.kernels.cpu.flatten import Flat
from foveate.patterns.bits import BitGroup, low_bits


def flatten_words(groups: Sequence[BitGroup], leading: tuple[int, int], n_q: int) -> tuple[Flat, bool] | None:
    """Return the flat arrays, and whether each query stands in one cell at most; ids are not checked.

    Args:
        groups: at least one.
        leading: the (b, h) they distinguish together.
        n_q: number of queries.

    Returns:
        None where a cell has absent queries before present ones, whose bits would have to move.
    """
    own, rows, other, columns, words, full = [], [], [], [], [], []
    for group in groups:
        query, key, word = (
            x.expand(*leading, -1, -1).flatten(0, 1) for x in (group.query, group.key, group.words)
        )
        present = query >= 0
        rows.append(_count(present))
        if not torch.equal(present, torch.arange(group.tq) < rows[-1][..., None]):
            return None
        there = key >= 0
        columns.append(_count(there))
        full.append(((word == low_bits(rows[-1])[..., None]) | ~there).all(-1))
        own.append(_by_set(query, present, rows[-1]))
        other.append(_by_set(key, there, columns[-1]))
        words.append(_by_set(word, there, columns[-1]))
    ids, start = (_line(parts).int() for parts in (own, other))
    own_ptr, run_ptr = (pad(torch.cat(counts, 1).flatten().cumsum(0), (1, 0)) for counts in (rows, columns))
    sets, cells = leading[0] * leading[1], len(own_ptr) - 1
    flat = Flat(
        torch.arange(sets + 1) * (cells // max(sets, 1)),
        own_ptr,
        ids,
        run_ptr,
        # Keys come in the order of their worth: runs of consecutive ones would not be worth a search.
        torch.stack([start, torch.ones_like(start)], dim=1),
        torch.where(torch.cat(full, 1).flatten(), -1, 8 * run_ptr[:-1]),
        _line(words),
    )
    lead = torch.arange(sets).repeat_interleave(torch.cat(rows, 1).sum(1))
    places = (lead * n_q + ids).bincount()
    return flat, not places.numel() or int(places.max()) <= 1


def _count(flags: Bool[Tensor, "s c t"]) -> Int[Tensor, "s c"]:
    """Return how many flags of each row are set; sums of floats are quick, and exact for fewer than 2^24."""
    return flags.float().sum(-1).long() if flags.shape[-1] < 1 << 24 else flags.sum(-1)


def _by_set(x: Int[Tensor, "s c t"], there: Tensor, count: Int[Tensor, "s c"]) -> Sequence[Tensor]:
    """Return what is there, a line for every set."""
    if int(count.sum()) == x.numel():
        return x.reshape(x.shape[0], -1).unbind(0)
    return x[there].split(count.sum(1).tolist())


def _line(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Put the groups of every set behind one another."""
    return torch.cat([piece for some in zip(*parts, strict=True) for piece in some])
