"""Lowering: expanding the cells gives the mask back, whatever the pattern, the sizes and the tile."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.patterns.axis import AxisRule
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.boxes import BoxGroup
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.lower import CACHE_SIZE, default_tile, lower
from foveate.patterns.schedule import Schedule
from foveate.patterns.specials import with_specials
from foveate.patterns.tables import MAX_CLASSES, axis_classes
from tests.patterns.strategies import grid_patterns, patterns, sequence_patterns, tables

TILES = st.one_of(st.none(), st.integers(1, 9))


def check(schedule, dense, *, closed):
    """Everything a schedule of a static pattern must be, against the dense mask."""
    schedule.validate()
    assert (schedule.product is not None) == closed
    assert torch.equal(schedule.expand()[0, 0], dense.int())
    assert schedule.is_single_cell
    assert schedule.pairs_needed == int(dense.sum())
    assert schedule.pairs_dense == dense.numel()
    computed, full = 0, 0
    for group in schedule.groups:
        computed += group.n_cells * group.tq * group.tk
        mask = group.mask()
        full += (
            group.n_cells if mask is None else int(mask.expand(1, 1, group.n_cells, -1, -1).all((3, 4)).sum())
        )
    assert schedule.pairs_computed == computed >= schedule.pairs_needed
    assert schedule.full_cells == full == schedule.n_cells - schedule.partial_cells

    back = schedule.transpose()
    back.validate()
    assert (back.n_q, back.n_k) == (schedule.n_k, schedule.n_q)
    assert torch.equal(back.expand()[0, 0], dense.T.int())
    assert back.is_single_cell
    assert (back.product is not None) == closed


@given(grid_patterns(), TILES, st.booleans())
def test_grid_patterns(pattern, tile, uniform):
    check(lower(pattern, tile=tile, uniform=uniform), pattern.dense(), closed=True)


@given(grid_patterns(), st.data())
def test_tiles_per_axis(pattern, data):
    tile = tuple(data.draw(st.integers(1, length + 1)) for length in pattern.grid)
    check(lower(pattern, tile=tile), pattern.dense(), closed=True)


@given(sequence_patterns(), st.integers(0, 30), st.integers(0, 30), TILES, st.booleans())
def test_sequence_patterns_of_two_lengths(pattern, n_q, n_k, tile, uniform):
    check(lower(pattern, n_q, n_k, tile, uniform=uniform), pattern.dense(n_q, n_k), closed=True)


@given(grid_patterns(), st.integers(0, 4), st.sampled_from(["all", "isolated"]), TILES, st.booleans())
def test_specials_before_a_grid(pattern, n, rule, tile, uniform):
    where = with_specials(pattern, n, rule)
    check(lower(where, tile=tile, uniform=uniform), where.dense(), closed=True)


@given(sequence_patterns(), st.integers(0, 3), st.integers(0, 20), st.integers(0, 20), TILES)
def test_specials_before_two_sequences(pattern, n, n_q, n_k, tile):
    where = with_specials(pattern, n)
    check(lower(where, n + n_q, n + n_k, tile), where.dense(n + n_q, n + n_k), closed=True)


@given(st.integers(1, 24), st.integers(1, 24), st.data(), TILES)
def test_composed_patterns(n_q, n_k, data, tile):
    pattern = data.draw(patterns(n_q, n_k))
    schedule = lower(pattern, n_q, n_k, tile)
    check(schedule, pattern.dense(n_q, n_k), closed=pattern.axes(n_q, n_k) is not None)


@given(st.integers(1, 20), st.integers(1, 3), st.data(), TILES)
def test_specials_by_a_pattern_of_their_own(n, specials, data, tile):
    where = with_specials(
        data.draw(patterns(n, n)), specials, data.draw(patterns(n + specials, n + specials))
    )
    check(lower(where, n + specials, tile=tile), where.dense(n + specials), closed=False)


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_tables(n_q, n_k, data):
    pattern = data.draw(tables(n_q, n_k))
    check(lower(pattern, n_q, n_k), pattern.dense(n_q, n_k), closed=False)


@given(st.integers(1, 11), st.data())
def test_padded_patterns_lower_like_others(length, data):
    grid = Grid(length, data.draw(st.integers(1, 7)))
    block = tuple(data.draw(st.integers(1, n)) for n in grid)
    padded = Halo(grid, block, data.draw(st.integers(0, 3)), "zero").padded()
    if padded is not None:
        check(lower(padded.pattern), padded.pattern.dense(), closed=True)


def test_phantoms_are_refused():
    with pytest.raises(UnsupportedError, match="phantom"):
        lower(Halo((8, 8), 4, 1, "zero"))


@pytest.mark.parametrize("n_q", [0, 1, 5])
@pytest.mark.parametrize("n_k", [0, 1, 5])
def test_tiny_lengths(n_q, n_k):
    for where in (Full(), Causal(), SlidingWindow(2), with_specials(Full(), 0)):
        check(lower(where, n_q, n_k), where.dense(n_q, n_k), closed=True)
    for where in (SlidingWindow(2) | Sinks(1), ~Full()):
        check(lower(where, n_q, n_k), where.dense(n_q, n_k), closed=False)


def test_queries_without_keys_stand_in_no_cell():
    schedule = lower(Causal(), 8, 3, 1)
    ids = torch.cat([group.q_ids().flatten() for group in schedule.groups])
    assert sorted(ids.tolist()) == [5, 6, 7]
    assert lower(~Full(), 6).groups == ()


def test_windows_become_whole_cells_even_when_shifted():
    schedule = lower(Windows((56, 56), 7, 3))
    assert schedule.pairs_needed == schedule.pairs_computed
    assert schedule.partial_cells == 0
    assert schedule.n_cells == 81


def test_uniform_makes_one_group_of_a_neighborhood():
    pattern = Neighborhood((64, 64), 13)
    exact, uniform = lower(pattern, tile=8), lower(pattern, tile=8, uniform=True)
    assert len(exact.groups) == 9
    assert len(uniform.groups) == 1
    (group,) = uniform.groups
    assert (group.n_cells, group.tq, group.tk) == (64, 64, 400)
    assert group.mask_variants().shape == (1, 1, 9, 64, 400)
    assert exact.pairs_needed == uniform.pairs_needed == 4096 * 169
    # An 8x8 tile needs 20 keys a side inside and 14 at the border.
    assert exact.pairs_computed == 64 * (6 * 20 + 2 * 14) ** 2


@pytest.mark.parametrize(
    ("pattern", "tile", "bound"),
    [
        (Neighborhood((64, 64), 13), (8, 8), 12.0),
        (Neighborhood((64, 64), 13), (4, 8), 14.4),
        (Neighborhood((56, 56), 7), (4, 4), 34.2),
        (Neighborhood((128, 128), 7, 2), (4, 8), 128),
        (Neighborhood((8, 32, 32), (3, 7, 7)), (2, 4, 4), 27.4),
        (Neighborhood((256, 256), 80, stride=16), (16, 16), 10.24),
        (SlidingWindow(255), (64,), 51.8),
    ],
)
def test_speed_up_bounds(pattern, tile, bound):
    schedule = lower(pattern, pattern.tokens or 16384, tile=tile)
    assert schedule.pairs_dense / schedule.pairs_computed == pytest.approx(bound, rel=0.01)


def test_a_million_tokens_take_kilobytes():
    for where, n in (
        (Neighborhood((1024, 1024), 13), None),
        (Neighborhood((1024, 1024), 7, 4, 3), None),
        (Neighborhood((32, 64, 64), (5, 9, 9)), None),
        (Neighborhood((1_000_000,), 1000), None),
        (SlidingWindow(1000), 1_000_000),
        (with_specials(Windows((1024, 1024), 16, 8), 4), None),
    ):
        schedule = lower(where, n)
        assert schedule.nbytes < 300_000
        assert schedule.transpose().nbytes < 300_000
        assert all(isinstance(group, BoxGroup) for group in schedule.groups)
    counts = lower(Neighborhood((1024, 1024), 13))
    assert counts.pairs_needed == 1024**2 * 169
    assert counts.transpose().pairs_needed == counts.pairs_needed


def test_long_causal_axes_have_a_bounded_number_of_groups():
    n, tile = 40_000, 32
    schedule = lower(Causal(), n, tile=tile)
    assert len(schedule.groups) < MAX_CLASSES < n // tile
    assert schedule.pairs_needed == n * (n + 1) // 2
    assert schedule.pairs_computed < 1.03 * sum(
        min(tile, n - a) * (a + min(tile, n - a)) for a in range(0, n, tile)
    )


def test_explicit_cells_keep_only_keys_that_are_seen():
    mask = torch.zeros(64, 500, dtype=torch.bool)
    mask[:, [3, 499]] = True
    schedule = lower(Explicit(mask), tile=64)
    (group,) = schedule.groups
    assert group.k_ids().flatten().tolist() == [3, 499]
    assert group.is_full


def test_blocks_lower_without_masks():
    table = torch.rand(16, 16) < 0.3
    schedule = lower(BlockList(8, table), 128)
    assert all(isinstance(group, ExplicitGroup) and group.allowed is None for group in schedule.groups)
    assert schedule.pairs_needed == int(table.sum()) * 64


def test_a_lattice_is_full_cells():
    schedule = lower(Lattice((16, 16), 4))
    assert (schedule.n_cells, schedule.full_cells, len(schedule.groups)) == (16, 16, 1)


def test_the_cache_returns_the_same_object():
    where = Neighborhood((9, 9), 3)
    assert lower(where) is lower(Neighborhood(Grid(9, 9), (3, 3)), 81, 81)
    assert lower(where, tile=3) is lower(where, tile=3)
    assert lower(where, tile=3) is not lower(where, tile=4)
    assert lower(where, tile=3) is not lower(where, tile=3, uniform=True)


def test_the_cache_is_bounded():
    where = SlidingWindow(1)
    first = lower(where, 1)
    for n in range(2, CACHE_SIZE + 3):
        lower(where, n)
    assert lower(where, 1) is not first


def test_the_cache_is_the_same_for_all_threads():
    where, found = Neighborhood((40, 40), 5, 3), []
    threads = [threading.Thread(target=lambda: found.append(lower(where))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(schedule is found[0] for schedule in found)


def test_schedules_pass_through():
    schedule = lower(Full(), 5)
    assert lower(schedule) is schedule
    assert lower(schedule, 5, 5) is schedule
    with pytest.raises(ArgumentError, match="n_k"):
        lower(schedule, 5, 6)

    class Routed:
        def __init__(self):
            self.schedule = Schedule(5, 5, ())

    routed = Routed()
    assert lower(routed) is routed.schedule


@pytest.mark.parametrize("tile", [0, -1, (2,), (2, 2, 2), (0, 2), 2.5, True])
def test_bad_tiles_are_named(tile):
    with pytest.raises(ArgumentError, match="tile"):
        lower(Neighborhood((6, 6), 3), tile=tile)


def test_bad_where_is_named():
    with pytest.raises(ArgumentError, match="where"):
        lower("neighborhood", 5)
    with pytest.raises(ArgumentError, match="n_q"):
        lower(Full())


def test_default_tiles():
    assert default_tile(Windows((56, 56), 7)) == (7, 7)
    assert default_tile(Lattice((64, 64), 8)) == (8, 8)
    assert default_tile(BlockList(32, [(0, 0)]), 64) == (32,)
    # Gathering dear: larger tiles; cells free: smaller ones.
    near, far = (default_tile(Neighborhood((64, 64), 13), key_cost=cost, cell_cost=0) for cost in (1, 200))
    assert near < far
    grid, sequence = Neighborhood((64, 64), 13), Sinks(4)
    assert default_tile(grid | sequence) == default_tile(grid)


@given(sequence_patterns(), st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_axis_classes_hold_every_query_once(pattern, n, tile, uniform):
    (rule,) = pattern.axes(n, n)
    classes = axis_classes(rule, tile, uniform=uniform)
    ids = [c.q_starts[:, None] + c.q_step * torch.arange(c.q_count) for c in classes]
    assert sorted(torch.cat([i.flatten() for i in ids]).tolist()) == list(range(n))
    assert sum(c.pairs for c in classes) == rule.pairs
    assert axis_classes(AxisRule.full(0, n), tile) == ()
