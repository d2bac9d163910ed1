"""`lower`: from who attends to whom, to the cells that kernels execute.

Separable patterns (and special tokens before one) become a closed form, a `BoxProduct`; patterns of blocks
bring one cell per query block; everything else is evaluated tile by tile. Selections bring their own Schedule.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
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
from foveate.patterns.schedule import Schedule
from foveate.patterns.specials import Specials
from foveate.patterns.tables import BoxProduct
from foveate.patterns.tiling import check_tile, plain_tile, tile_for

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
            one integer or one per axis; None = `default_tile`.
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

    Args:
        where: a Pattern.
        n_q: number of queries; may be left out when the pattern has a grid.
        n_k: number of keys.
        model: keywords of `tile_for`, to price for another machine or backend.
    """
    n_q, n_k = where.lengths(n_q, n_k)
    if where.own_block is not None:
        return (where.own_block,)
    return tile_for(_frame(where, n_q, n_k)[0], **model)


def _lower(where: Pattern, n_q: int, n_k: int, tile, uniform: bool) -> Schedule:
    if where.own_block is not None and tile is None:
        return Schedule(n_q, n_k, where.own_groups(n_q, n_k))
    rules, specials = _frame(where, n_q, n_k)
    sizes = tile_for(rules) if tile is None else check_tile(tile, len(rules))
    closed = _closed(where, n_q, n_k)
    if closed is not None:
        rules, lead, linked = closed
        product = BoxProduct.of(rules, sizes, uniform=uniform, lead=lead, linked=linked)
        return Schedule(n_q, n_k, product.groups(), product=product)
    frame = BoxProduct.of(rules, sizes, lead=(specials, specials))
    tiles: list[Tensor] = frame.query_tiles()
    if specials:
        tiles += [rows[None] for rows in torch.arange(specials).split(_SPECIAL_ROWS)]
    return Schedule(n_q, n_k, lower_tiles(where, tiles, n_q, n_k))


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


def _frame(where: Pattern, n_q: int, n_k: int) -> tuple[tuple[AxisRule, ...], int]:
    """Return the axis rules by which queries are put into tiles, and how many specials stand before them.

    For what is not separable itself, those of the part with most axes: a grid pattern united with others is
    still best tiled along its grid. Without any, the sequence.
    """
    rules = where.axes(n_q, n_k)
    if rules is not None:
        return rules, 0
    if isinstance(where, Specials):
        inner, nested = _frame(where.where, n_q - where.n, n_k - where.n)
        return inner, where.n + nested
    if isinstance(where, Beside):
        frames = [_frame(part, n_q, n) for part, n in where.parts]
        return max(frames, key=lambda frame: len(frame[0]))
    parts = where.parts if isinstance(where, And | Or) else (where.part,) if isinstance(where, Not) else ()
    frames = [_frame(part, n_q, n_k) for part in parts]
    if frames:
        return max(frames, key=lambda frame: len(frame[0]))
    return (AxisRule.full(n_q, n_k),), 0
