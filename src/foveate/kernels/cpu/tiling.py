"""Which cells the core gets: the price of a cell, the tile that costs least, and the cells by query and by key.

    cost = rows streamed * (lanes * (width * product + pair) + width * row)  +  cells * (cell + lanes * width * lane)

Own rows fill 16, 32 or 64 lanes, so that a cell of 33 costs as much as one of 64. Wide cells pack a key once for
more queries, narrow ones compute fewer masked pairs. Nanoseconds on one core of an AVX-512 server; only ratios
matter for the tile.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.constants import constant
from foveate.kernels.cpu.flatten import LANES, Facts, Flat, flatten, transposed
from foveate.patterns.lower import default_tile, lower
from foveate.patterns.schedule import Schedule
from foveate.patterns.tables import BoxProduct
from foveate.patterns.tiling import tile_for

# Fitted to the forward of 75 combinations of patterns, tiles and head sizes, single-threaded on an AVX-512 server
# (median error 6%), 16 lanes made dearer since packing weighs more in bf16 and in the backward. Per lane and number of
# a row in both products, by the number of lanes. What a lane and a cell cost was fitted again when rows came to be
# transposed in registers.
PRODUCT = {16: 0.0172, 32: 0.0127, 64: 0.0120}
# Per pair (exponential, maximum, sum), per number of a packed row, per number of a lane, per cell.
PAIR, ROW, LANE, CELL = 0.17, 0.0044, 0.4, 40.0
# Rows are padded to a multiple of this by the number of lanes; half of it is wasted on average.
STEP = {16: 24, 32: 12, 64: 6}
# Head sizes d + d_v that tiles are chosen for: their choice hardly depends on it.
WIDTH = 128


def lanes(rows: int) -> int:
    """Return how many lanes `rows` own rows take."""
    return 16 if rows <= 16 else 32 if rows <= 32 else LANES


def price(rows: int, others: float, cells: int, width: int = WIDTH) -> float:
    """Return the nanoseconds of `cells` cells of `rows` own rows past which `others` rows stream in all."""
    n = lanes(rows)
    streamed = others + cells * STEP[n] / 2
    by_row = n * (width * PRODUCT[n] + PAIR) + width * ROW
    return streamed * by_row + cells * (CELL + n * width * LANE)


def _tile_price(queries: int, pairs: float, keys: float, cells: int) -> float:
    return price(queries, keys, cells)


@lru_cache(maxsize=128)
def tile_of(where: Any, n_q: int, n_k: int) -> tuple[int, ...] | None:
    """Return the tile that costs least, None where the pattern brings its own blocks."""
    if where.own_block is not None:
        return None
    return default_tile(where, n_q, n_k, price=_tile_price, max_queries=LANES)


def lowered(where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None) -> Schedule:
    """Return the cells of a static pattern, in the tiles that suit the core unless told otherwise."""
    return lower(where, n_q, n_k, tile_of(where, n_q, n_k) if tile is None else tile)


def single(schedule: Schedule) -> Schedule:
    """Return the same pairs with every query in one cell at most.

    Raises:
        ArgumentError: if an id lies outside of the schedule's lengths.
    """
    if schedule.product is not None or flattened(schedule)[2]:
        return schedule
    return schedule.memo("cpu single", lambda: schedule.transpose(LANES).transpose(LANES))


def flat(schedule: Schedule) -> tuple[Flat, Facts]:
    """Return `flatten(schedule)`, kept with the schedule."""
    return flattened(schedule)[:2]


def flattened(schedule: Schedule) -> tuple[Flat, Facts, bool]:
    """Return `flatten(schedule)`: cells, facts, whether each query stands in one cell at most; kept with it."""
    return schedule.memo("cpu flat", lambda: flatten(schedule))


def by_key(schedule: Schedule) -> tuple[Flat, Facts]:
    """Return the flat arrays of the schedule with queries and keys exchanged, kept with the schedule.

    Closed forms get tiles that suit the core; cells without one are exchanged by the core itself.
    """
    if schedule.product is not None:
        return flat(_closed_by_key(schedule))
    return schedule.memo("cpu by key", lambda: transposed(*flat(schedule), schedule.n_k))


def _closed_by_key(schedule: Schedule) -> Schedule:
    old = schedule.product
    assert old is not None

    def make() -> Schedule:
        rules = tuple(rule.transpose() for rule in old.rules())
        tile = tile_for(rules, price=_tile_price, max_queries=LANES)
        new = BoxProduct.of(rules, tile, lead=(old.lead[1], old.lead[0]), linked=old.linked)
        return Schedule(schedule.n_k, schedule.n_q, new.groups(), "sum", product=new)

    return schedule.memo("cpu closed by key", make)


def packed(schedule: Schedule, with_keys: bool) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return the arrays of a call (by query, and by key when gradients need them) and what to know about them.

    The integers are the pairs computed and the `Facts` of both. A query may stand in several cells.

    Raises:
        ArgumentError: if an id lies outside of the schedule's lengths.
    """
    schedule = single(schedule)
    arrays, facts = flat(schedule)
    other: tuple[Tensor, ...] = ()
    other_facts = Facts(1, 1, 0, 0)
    if with_keys:
        other, other_facts = by_key(schedule)
    return (*arrays, *other), (schedule.pairs_computed, *facts, *other_facts)


@constant
def static_packed(
    where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None, with_keys: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return `packed` of a static pattern."""
    return packed(lowered(where, n_q, n_k, tile), with_keys)


def cost(schedule: Schedule, width: int) -> float:
    """Return the nanoseconds one core takes for the cells of a schedule, per batch and head, forward."""
    return sum(
        price(min(g.tq, LANES), g.n_cells * g.tk * -(-g.tq // LANES), g.n_cells * -(-g.tq // LANES), width)
        for g in schedule.groups
    )


@constant
def static_cost(where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None, width: int) -> float:
    """Return `cost` of a static pattern."""
    schedule = lowered(where, n_q, n_k, tile)
    return schedule.memo(("cpu cost", width), lambda: cost(schedule, width))


@constant
def static_reach(
    where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None, slopes: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...], int, tuple[tuple[int, int], ...]] | None:
    """Return (query grid, key grid, specials, (lowest, highest) key - query offset per axis) of a pattern.

    None for patterns without a closed form, and where other keys than special tokens stand before the grid.
    With `slopes` s, one per axis, offsets are key - s query; None too for another number of axes.
    """
    schedule = lowered(where, n_q, n_k, tile)
    return schedule.memo(("cpu reach", slopes), lambda: reach(schedule, slopes))


def reach(schedule: Schedule, slopes: tuple[int, ...] | None = None) -> tuple | None:
    """Return `static_reach` of a schedule."""
    product = schedule.product
    if product is None or product.lead[0] != product.lead[1]:
        return None
    rules = product.rules()
    slopes = (1,) * len(rules) if slopes is None else slopes
    if len(slopes) != len(rules):
        return None
    found = []
    for rule, slope in zip(rules, slopes, strict=True):
        some = rule.count > 0
        first = (rule.start - slope * torch.arange(rule.n_q))[some]
        last = first + rule.step * (rule.count[some] - 1)
        found.append((int(first.min()), int(last.max())) if first.numel() else (0, 0))
    return product.q_sizes, product.k_sizes, product.lead[0], tuple(found)
