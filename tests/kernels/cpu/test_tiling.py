"""Tiles for the core: what the cost model chooses, and what it may never choose."""

import pytest
import torch
from hypothesis import given

from foveate.kernels.cpu.flatten import LANES
from foveate.kernels.cpu.tiling import by_key, cost, lanes, lowered, packed, price, reach, single, tile_of
from foveate.patterns.basic import BlockList, Causal, SlidingWindow
from foveate.patterns.grids import Neighborhood, Windows
from foveate.patterns.lower import lower
from foveate.patterns.selection import Selection
from tests.patterns.strategies import grid_patterns


@given(where=grid_patterns())
def test_a_tile_never_has_more_than_64_queries(where):
    n = where.lengths(None, None)[0]
    assert torch.tensor(tile_of(where, n, n)).prod() <= LANES


@pytest.mark.parametrize(
    ("where", "n"),
    [
        (Neighborhood((64, 64), 13), 4096),
        (Neighborhood((128, 128), 7, dilation=2), 16384),
        (Neighborhood((8, 32, 32), (3, 7, 7)), 8192),
        (SlidingWindow(255), 4096),
        (Windows((56, 56), 7), 3136),
        (Causal(), 1024),
    ],
    ids=repr,
)
def test_the_chosen_tile_is_cheapest_among_its_neighbours(where, n):
    """The model's totals come from per-axis sums; here they are compared with the cells themselves."""
    best = tile_of(where, n, n)
    chosen = cost(lower(where, n, n, best), 128)
    for axis in range(len(best)):
        for factor in (0.5, 2):
            other = list(best)
            other[axis] = max(1, int(other[axis] * factor))
            if torch.tensor(other).prod() <= LANES:
                assert chosen <= 1.05 * cost(lower(where, n, n, tuple(other)), 128)


def test_transposed_cells_compute_about_as_many_pairs():
    for where, n in ((Neighborhood((8, 32, 32), (3, 7, 7)), 8192), (Neighborhood((64, 64), 13), 4096)):
        schedule = lowered(where, n, n, None)
        flat, _ = by_key(schedule)
        streamed = torch.nn.functional.pad(flat.runs[:, 1].cumsum(0), (1, 0))[flat.run_ptr].diff()
        assert int((streamed * flat.own_ptr.diff()).sum()) <= 1.3 * schedule.pairs_computed


def test_lanes_and_prices():
    assert [lanes(n) for n in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
    assert price(33, 100, 1) == price(64, 100, 1)
    assert price(16, 100, 1) < price(17, 100, 1)


def test_block_lists_bring_their_own_tiles():
    where = BlockList(16, ((0, 0), (1, 2)))
    assert tile_of(where, 48, 48) is None
    assert {g.tq for g in lowered(where, 48, 48, None).groups} == {16}


def test_reach():
    known = reach(lower(Neighborhood((9, 12), (3, 5), dilation=(1, 2)), tile=4))
    assert known == ((9, 12), (9, 12), 0, ((-2, 2), (-8, 8)))
    assert (
        reach(
            Selection(torch.zeros(1, 1, 1, 1).long(), torch.zeros(1, 1, 1, 1).long(), n_q=1, n_k=1).schedule
        )
        is None
    )


def test_packed_is_kept_with_the_schedule():
    schedule = lower(Neighborhood((12, 12), 3), tile=4)
    first, facts = packed(schedule, True)
    again, _ = packed(schedule, True)
    assert len(first) == 14
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert facts[0] == schedule.pairs_computed
    assert len(packed(schedule, False)[0]) == 7


def test_cells_of_several_a_query_become_one():
    q = torch.tensor([[0, 1], [1, 2]]).view(1, 1, 2, 2)
    k = torch.tensor([[0, 1], [2, 3]]).view(1, 1, 2, 2)
    schedule = Selection(q, k, n_q=4, n_k=4).schedule
    merged = single(schedule)
    assert merged.is_single_cell
    assert torch.equal(merged.expand(), schedule.expand())
    assert single(merged) is merged
