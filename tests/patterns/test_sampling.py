"""Tiles of patterns without a closed form: what sampling finds, against the cells themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.grids import Lattice, Neighborhood, Windows
from foveate.patterns.lower import default_tile, lower
from foveate.patterns.power import PowerBlocks
from foveate.patterns.sampling import Frame, Sampler
from foveate.patterns.specials import with_specials
from tests.patterns.strategies import patterns

G = Grid(64, 64)


def listed(n: int, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(
    ("where", "n", "most"),
    [
        # In the tiles that are best for one part alone: 100%, 100%, 30%, 42%, 56%, 39%, 15% and 52%.
        (Windows(G, (1, 64)) | Windows(G, (64, 1)), 4096, 0.13),
        (with_specials(Windows(G, (1, 64)) | Windows(G, (64, 1)), 4), 4100, 0.13),
        (BlockList(128, listed(64, 0.1)) & Causal(), 8192, 0.06),
        (BlockList(32, listed(256, 0.05)) & Causal(), 8192, 0.03),
        (PowerBlocks(8), 4096, 0.04),
        (PowerBlocks(64) & Causal(), 8192, 0.07),
        (Sinks(4) | SlidingWindow(255), 8192, 0.05),
        (Neighborhood(G, 7) | Lattice(G, 8), 4096, 0.22),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, float | int) else None,
)
def test_few_pairs_are_computed_in_vain(where, n, most):
    assert lower(where, n).pairs_computed <= most * n * n
    # Where a cell costs thousands of pairs, tiles are somewhat larger, and still of the pattern's shape.
    dear = default_tile(where, n, key_cost=8.0, cell_cost=2048.0)
    assert lower(where, n, tile=dear).pairs_computed <= most * n * n


@pytest.mark.parametrize("block", [24, 32, 48])
def test_compositions_keep_the_blocks_of_a_part(block):
    """Tiles that straddled two blocks of queries would compute the keys of both for each."""
    where = BlockList(block, listed(40, 0.1)) & Causal()
    n = 40 * block
    (tile,) = default_tile(where, n)
    assert block % tile == 0
    needed = BlockList(block, listed(40, 0.1).tril()).dense(n).sum()
    assert lower(where, n).pairs_computed <= 1.01 * needed


def test_blocks_on_a_grid_are_tiles_of_consecutive_tokens():
    where = BlockList(96, listed(24, 0.1)) | Neighborhood((48, 48), 1)
    tile = default_tile(where, 2304)
    assert len(tile) == 1
    assert 96 % tile[0] == 0
    schedule = lower(where, 2304, tile=tile)
    assert torch.equal(schedule.expand()[0, 0], where.dense(2304).int())
    # One number still means every axis of the grid, and other patterns have no such tiles.
    assert lower(where, 2304, tile=4).groups[0].tq == 16
    with pytest.raises(ArgumentError, match="tile"):
        lower(Windows(G, (1, 64)) | Windows(G, (64, 1)), tile=(16,))


def test_dilation_groups_are_kept_or_not_as_the_tile_wants():
    """Both parts put queries into tiles in their own way; the one that sees fewer keys is taken."""
    near, far = Neighborhood(G, 9), Neighborhood(G, 3, dilation=8)
    for where in (near | far, far | near):
        assert lower(where, tile=(4, 4)).pairs_computed <= 0.12 * 4096**2
    scattered = Neighborhood(G, 1) | Neighborhood(G, 7, dilation=8)
    cells = lower(scattered, tile=(4, 4))
    assert cells.pairs_computed <= 0.03 * 4096**2


@given(st.integers(0, 40), st.integers(0, 40), st.data(), st.integers(1, 64), st.floats(0, 100))
def test_any_composition_gets_a_tile_it_can_be_lowered_with(n_q, n_k, data, max_queries, key_cost):
    where = data.draw(patterns(n_q, n_k))
    tile = default_tile(where, n_q, n_k, key_cost=key_cost, max_queries=max_queries)
    assert math.prod(tile) <= max_queries or where.own_block is not None
    schedule = lower(where, n_q, n_k, tile)
    assert torch.equal(schedule.expand()[0, 0], where.dense(n_q, n_k).int())
    assert schedule.is_single_cell


def test_samples_tell_what_cells_compute():
    where = Windows(G, (1, 64)) | Neighborhood(G, 5, dilation=2)
    for tile in ((1, 16), (4, 4), (8, 2), (16, 16)):
        frames = [Frame(rules) for part in where.parts if (rules := part.axes(4096, 4096)) is not None]
        sampler = Sampler(where, 4096, 4096, frames)
        at = sampler.frames.index(sampler.frame_for(tile))
        counted, cells = sampler.count(at, tile), lower(where, tile=tile)
        assert counted.pairs == pytest.approx(cells.pairs_computed, rel=0.2)
        assert counted.cells == pytest.approx(cells.n_cells, rel=0.01)


def test_few_pairs_are_looked_at(monkeypatch):
    """A choice among dozens of tiles looks at a small part of a mask of 16k x 16k."""
    seen = []
    grid = Grid(128, 128)
    where = Windows(grid, (1, 128)) | Windows(grid, (128, 1))
    allowed = type(where).allowed

    def counted(self, q, k, n_q, n_k):
        seen.append(q.numel() * k.numel())
        return allowed(self, q, k, n_q, n_k)

    monkeypatch.setattr(type(where), "allowed", counted)
    default_tile(where)
    assert max(seen) <= 1 << 16
    assert sum(seen) <= 2 << 20
    first = len(seen)
    # Another price for the same pattern finds the counts there already.
    default_tile(where, key_cost=30.0)
    assert len(seen) - first <= 16


def test_frames_that_are_alike_count_once():
    rules = (AxisRule.full(8, 8), AxisRule.full(8, 8))
    sampler = Sampler(Full(), 64, 64, [Frame(rules), Frame(rules), Frame(rules, lead=1)])
    assert len(sampler.frames) == 2


def test_the_choice_is_the_same_every_time():
    mask = listed(512, 0.01)
    found = set()
    for _ in range(2):
        where = Explicit(mask) | SlidingWindow(16)
        sampler = Sampler(where, 512, 512, [Frame((AxisRule.full(512, 512),))])
        found.add(sampler.best(lambda queries, pairs, keys, cells: pairs + 100 * cells, 64, [(0, (16,))]))
    assert len(found) == 1


def test_tiles_of_uneven_size_are_weighed_by_their_queries():
    """Queries without keys beside one long window: many tiles of one query, and one that costs everything."""
    long = torch.cat([torch.arange(32), torch.full((992,), 32)])
    rule = AxisRule(1024, 1024, long, torch.where(long < 32, 1, 992))
    for where in (Full(), SlidingWindow(1023)):
        sampler = Sampler(where, 1024, 1024, [Frame((rule,))])
        for tile in (992, 256):
            counted = sampler.count(0, (tile,))
            assert counted.pairs > 0.4 * 1024**2
            assert counted.keys < 1024 * (1024 / tile + 32)


def test_few_tiles_are_counted_exactly():
    where = SlidingWindow(10) | Sinks(3)
    for tile in (32, 50, 100):
        counted = Sampler(where, 100, 100, [Frame((AxisRule.full(100, 100),))]).count(0, (tile,))
        cells = lower(where, 100, tile=tile)
        assert counted.cells == cells.n_cells
        assert counted.pairs == cells.pairs_computed
        assert counted.keys == sum(group.n_cells * group.tk for group in cells.groups)
