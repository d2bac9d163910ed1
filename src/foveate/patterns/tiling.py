"""Which tile: a small cost model over the axis tables, no constant for all patterns.

    cost = pairs computed + KEY_COST * keys gathered + CELL_COST * cells

in units of one (query, key) pair. All three are products over the axes of per-axis sums, so that trying every
combination of tile sizes costs next to nothing. Larger tiles gather a key once for more queries, smaller ones
compute fewer masked pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from foveate.core.errors import bad
from foveate.patterns.axis import AxisRule
from foveate.patterns.tables import AxisOrder

# (queries of a full tile, pairs computed, keys gathered, cells) -> cost; pairs and keys may be estimates.
Price = Callable[[int, float, float, int], float]

# Copying one key and one value row of 64 numbers into a cell, in pairs (4 * 64 FLOPs each): measured for the
# plain gather in torch on a 2-core server, between 15 and 40.
KEY_COST = 24.0
# Entering a cell: index arithmetic, the mask, the tails of vectors.
CELL_COST = 512.0
# Queries of one cell: beyond this the rows of a cell no longer stay in the second-level cache.
MAX_QUERIES = 1024
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# On axes as long as this, tiles below 16 queries are not tried: their tables would be longer than useful.
_LONG = 1 << 16


def tile_for(
    rules: tuple[AxisRule, ...],
    *,
    key_cost: float = KEY_COST,
    cell_cost: float = CELL_COST,
    price: Price | None = None,
    max_queries: int = MAX_QUERIES,
) -> tuple[int, ...]:
    """Return the tile sizes, one per axis, of least cost.

    Args:
        rules: the axes.
        key_cost: of gathering a key, in pairs, for the model of this file.
        cell_cost: of a cell, in pairs, for the model of this file.
        price: another model: (queries of a full tile, pairs computed, keys gathered, cells) -> cost.
        max_queries: the most queries a tile may have.
    """
    cost_by, _ = cost_of(key_cost=key_cost, cell_cost=cell_cost, price=price)
    priced = []
    for rule in rules:
        order = AxisOrder(rule)
        longest = max(order.longest, 1)
        shared = order.shared
        sizes = {min(s, longest) for s in (*_SIZES, shared, 2 * shared, 4 * shared) if s <= 2 * longest}
        if rule.n_q >= _LONG:
            sizes = {s for s in sizes if s >= min(16, longest)}
        priced.append([(size, *order.price(size)) for size in sorted(sizes)])
    best, best_cost = tuple(1 for _ in rules), math.inf
    for combination in itertools.product(*priced):
        tile = tuple(entry[0] for entry in combination)
        queries = math.prod(tile)
        if queries > max_queries:
            continue
        pairs, keys, cells = (math.prod(entry[i] for entry in combination) for i in (1, 2, 3))
        cost = cost_by(queries, pairs, keys, cells)
        if cost < best_cost:
            best, best_cost = tile, cost
    return best


def cost_of(
    *,
    key_cost: float = KEY_COST,
    cell_cost: float = CELL_COST,
    price: Price | None = None,
    max_queries: int = MAX_QUERIES,
) -> tuple[Price, int]:
    """Return the price that the keywords of `tile_for` stand for, and the most queries of a tile."""
    if price is None:
        return lambda queries, pairs, keys, cells: pairs + key_cost * keys + cell_cost * cells, max_queries
    return price, max_queries


def plain_tile(tile: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return what a user may write for a tile as a hashable value.

    Raises:
        ArgumentError: naming `tile`, unless it is one positive integer or a sequence of them.
    """
    sizes = tuple(tile) if isinstance(tile, Sequence) else (tile,)
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise bad("tile", tile, "a positive integer, or one per axis")
    return sizes if isinstance(tile, Sequence) else tile


def check_tile(tile: int | tuple[int, ...], n_axes: int) -> tuple[int, ...]:
    """Spread one tile size over the axes, or check that there is one per axis.

    Raises:
        ArgumentError: naming `tile`, when their numbers differ.
    """
    sizes = (tile,) * n_axes if isinstance(tile, int) else tile
    if len(sizes) != n_axes:
        raise bad("tile", tile, f"one integer, or {n_axes} (one per axis)")
    return sizes
