"""`lower`: from who attends to whom, to the cells that kernels execute.

Separable patterns (and special tokens before one) become a closed form, a `BoxProduct`; patterns of blocks
bring one cell per query block; everything else is evaluated tile by tile, in tiles that `sampling.py` chooses.
Selections bring their own Schedule.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedError, bad
from foveate.patterns.axis import AxisRule
from foveate.patterns.banks import Beside
from foveate.patterns.basic import Full
from foveate.patterns.compose import And, Not, Or
from foveate.patterns.generic import lower_tiles
from foveate.patterns.pattern import Pattern
from foveate.patterns.sampling import Frame, Sampler
from foveate.patterns.schedule import Schedule
from foveate.patterns.specials import Specials
from foveate.patterns.tables import BoxProduct
from foveate.patterns.tiling import check_tile, cost_of, plain_tile, tile_for

# Schedules kept; a network has a few patterns, a benchmark a few dozens.
CACHE_SIZE = 128
# Rows of special tokens evaluated together where their rule is a pattern of its own.
_SPECIAL_ROWS = 16

_cache: OrderedDict[tuple, Schedule] = OrderedDict()
_lock = threading.Lock()


def lower(
    where: Pattern | Schedule | object,
    n_q: int | None = None,
    n_k: int | None = None,
    tile: int | Sequence[int] | None = None,
    *,
    uniform: bool = False,
) -> Schedule:
    """Return the cells of `where`; the same object for the same arguments (the last CACHE_SIZE are kept).

    Args:
        where: a Pattern; a Selection or a Schedule, which are cells already and come back as they are.
        n_q: number of queries; may be left out when the pattern has a grid, or for cells.
        n_k: number of keys, by default as many as the pattern says (`n_q` mostly).
        tile: queries of a cell along every axis of the pattern's grid (along the sequence when it has none),
            one integer or one per axis; None = `default_tile`. Where a part of a composition on a grid brings
            blocks of consecutive tokens, `(n,)` stands for tiles of n such tokens.
        uniform: make few groups with several masks each (small key boxes grow), for backends that run one
            batched call per group; by default cells compute as few pairs as their tiles allow.

    Raises:
        ArgumentError: naming the argument that makes no sense.
        UnsupportedError: for patterns with phantom keys; lower `where.padded().pattern` instead.
    """
    schedule = where if isinstance(where, Schedule) else getattr(where, "schedule", None)
    if isinstance(schedule, Schedule):
        for name, got, has in (("n_q", n_q, schedule.n_q), ("n_k", n_k, schedule.n_k)):
            if got is not None and got != has:
                raise bad(name, got, f"{has}, the {name} of the cells given as where")
        return schedule
    if not isinstance(where, Pattern):
        raise bad("where", type(where).__name__, "a Pattern, a Selection or a Schedule")
    if where.has_phantoms:
        raise UnsupportedError(
            f"{where!r} has phantom keys, which no cell can hold. "
            "Lower `where.padded().pattern` over its padded key grid, as `attend` does."
        )
    n_q, n_k = where.lengths(n_q, n_k)
    tile = None if tile is None else plain_tile(tile)
    key = (where, n_q, n_k, tile, uniform)
    with _lock:
        found = _cache.get(key)
        if found is not None:
            _cache.move_to_end(key)
            return found
    made = _lower(where, n_q, n_k, tile, uniform)
    with _lock:
        # Two threads may have made it at once; the first one to come here wins, so that identity holds.
        made = _cache.setdefault(key, made)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return made


def default_tile(
    where: Pattern, n_q: int | None = None, n_k: int | None = None, **model: Any
) -> tuple[int, ...]:
    """Return the tile, one size per axis, that costs least by the model of `foveate.patterns.tiling`.

    For closed forms the model is exact; for other patterns it is fed with the keys that sample tiles see
    (`foveate.patterns.sampling`). Where a part of a composition brings blocks of its own, one size may stand
    for a tile of consecutive tokens, whatever the grid.

    Args:
        where: a Pattern.
        n_q: number of queries; may be left out when the pattern has a grid.
        n_k: number of keys.
        model: keywords of `tile_for`, to price for another machine or backend.
    """
    n_q, n_k = where.lengths(n_q, n_k)
    if where.own_block is not None:
        return (where.own_block,)
    return _tile(where, n_q, n_k, **model)


def _lower(where: Pattern, n_q: int, n_k: int, tile, uniform: bool) -> Schedule:
    if where.own_block is not None and tile is None:
        return Schedule(n_q, n_k, where.own_groups(n_q, n_k))
    closed = _closed(where, n_q, n_k)
    if closed is not None:
        rules, lead, linked = closed
        sizes = tile_for(rules) if tile is None else check_tile(tile, len(rules))
        product = BoxProduct.of(rules, sizes, uniform=uniform, lead=lead, linked=linked)
        return Schedule(n_q, n_k, product.groups(), product=product)
    tried = _sampler(where, n_q, n_k)
    if tile is None:
        tile = _tile(where, n_q, n_k)
    elif isinstance(tile, int) or len(tile) not in {len(frame.rules) for frame in tried.frames}:
        tile = check_tile(tile, len(tried.frames[0].rules))
    rules, specials, _ = tried.frame_for(tile)
    frame = BoxProduct.of(rules, tile, lead=(specials, specials))
    tiles: list[Tensor] = frame.query_tiles()
    if specials:
        tiles += [rows[None] for rows in torch.arange(specials).split(_SPECIAL_ROWS)]
    return Schedule(n_q, n_k, lower_tiles(where, tiles, n_q, n_k))


def _tile(where: Pattern, n_q: int, n_k: int, **model: Any) -> tuple[int, ...]:
    """Return the tile of least cost of a pattern that brings no cells of its own."""
    closed = _closed(where, n_q, n_k)
    if closed is not None:
        return tile_for(closed[0], **model)
    tried = _sampler(where, n_q, n_k)
    cost, max_queries = cost_of(**model)
    starts = [(i, tile_for(frame.rules, **model)) for i, frame in enumerate(tried.frames) if not frame.sizes]
    return tried.best(cost, max_queries, starts)


@lru_cache(maxsize=32)
def _sampler(where: Pattern, n_q: int, n_k: int) -> Sampler:
    """Return the frames of a pattern, those with most axes first, and what tiles in them come to.

    A grid pattern united with others is best tiled along its grid, a list of blocks by its blocks.
    """
    found = _frames(where, n_q, n_k)
    most = max(len(frame.rules) for frame in found)
    frames = [frame for frame in found if len(frame.rules) == most and not frame.sizes]
    return Sampler(where, n_q, n_k, frames + [frame for frame in found if frame.sizes])


def _closed(where: Pattern, n_q: int, n_k: int) -> tuple[tuple[AxisRule, ...], tuple[int, int], bool] | None:
    """Return the axis rules, the tokens before the grid (`BoxProduct.lead`), and whether both see one another."""
    if isinstance(where, Beside):
        return _closed_banks(where, n_q)
    if isinstance(where, Specials):
        rules = where.where.axes(n_q - where.n, n_k - where.n)
        if rules is None or where.rule not in ("all", "isolated"):
            return None
        return rules, (where.n, where.n), where.rule == "all"
    rules = where.axes(n_q, n_k)
    return None if rules is None else (rules, (0, 0), True)


def _closed_banks(where: Beside, n_q: int) -> tuple[tuple[AxisRule, ...], tuple[int, int], bool] | None:
    """Keys that every query sees may stand before one separable bank, special tokens between them or not."""
    *seen, (last, n_last) = where.parts
    if not all(isinstance(part, Full) for part, _ in seen):
        return None
    inner = _closed(last, n_q, n_last)
    if inner is None or not inner[2]:
        return None
    rules, (specials, of_keys), _ = inner
    return rules, (specials, where.first[-1] + of_keys), True


def _frames(where: Pattern, n_q: int, n_k: int) -> list[Frame]:
    """Return the ways to put queries into tiles that the parts of a pattern suggest; at least the sequence."""
    rules = where.axes(n_q, n_k)
    if rules is not None:
        return [Frame(rules)]
    if isinstance(where, Specials):
        inner = _frames(where.where, n_q - where.n, n_k - where.n)
        return [frame._replace(lead=where.n + frame.lead) for frame in inner]
    if isinstance(where, Beside):
        return [frame for part, n in where.parts for frame in _frames(part, n_q, n)]
    parts = where.parts if isinstance(where, And | Or) else (where.part,) if isinstance(where, Not) else ()
    frames = [frame for part in parts for frame in _frames(part, n_q, n_k)]
    if frames:
        return frames
    sequence = (AxisRule.full(n_q, n_k),)
    block = where.own_block
    if block is None:
        return [Frame(sequence)]
    # Tiles that hold blocks whole, or cut them evenly.
    pieces = [block >> i for i in range(1, block.bit_length()) if block % (1 << i) == 0]
    return [Frame(sequence), Frame(sequence, sizes=(block, 2 * block, 4 * block, *pieces))]
