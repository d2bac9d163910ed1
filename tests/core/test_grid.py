"""Grid: geometry of flattened tokens."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid

grids = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda sizes: Grid(*sizes))


@given(grids)
def test_tokens_are_row_major(grid):
    ids = torch.arange(grid.numel)
    coords = grid.coords()
    assert coords.shape == (grid.numel, grid.ndim)
    expected = torch.stack(torch.unravel_index(ids, grid.sizes), dim=-1)
    assert torch.equal(coords, expected)
    assert all(torch.equal(a, b) for a, b in zip(grid.unravel(ids), coords.unbind(1), strict=True))
    assert torch.equal(grid.ravel(coords.unbind(1)), ids)


def test_one_token_by_hand():
    grid = Grid(2, 3, 4)
    assert [int(c) for c in grid.unravel(torch.tensor(17))] == [1, 1, 1]
    assert int(grid.ravel([torch.tensor(1)] * 3)) == 17


@given(grids)
def test_values_are_equal_hashable_and_pasteable(grid):
    same = Grid(*grid.sizes)
    assert same == grid
    assert hash(same) == hash(grid)
    assert eval(repr(grid)) == grid
    assert pickle.loads(pickle.dumps(grid)) == grid == copy.deepcopy(grid)
    assert tuple(grid) == grid.sizes
    assert (len(grid), grid[-1]) == (grid.ndim, grid.sizes[-1])
    assert Grid(*grid.sizes[::-1], *[] if grid.ndim == 3 else [1]) != grid or grid.ndim == 3


def test_different_grids_differ():
    assert Grid(2, 3) != Grid(3, 2)
    assert Grid(6) != Grid(6, 1)
    assert Grid(6) != 6


def test_nothing_can_be_assigned():
    with pytest.raises(AttributeError, match="immutable"):
        Grid(2).sizes = (3,)


@pytest.mark.parametrize("sizes", [(), (1, 2, 3, 4), (0,), (-1, 2), (2.0,), ("3",), (True, 2)])
def test_bad_sizes_are_named(sizes):
    with pytest.raises(ArgumentError, match=r"^Grid: expected"):
        Grid(*sizes)


def test_of_takes_what_users_write():
    assert Grid.of(5) == Grid(5)
    assert Grid.of([4, 5]) == Grid(4, 5)
    grid = Grid(3)
    assert Grid.of(grid) is grid


def test_per_axis():
    grid = Grid(4, 5)
    assert grid.per_axis(3, "window") == (3, 3)
    assert grid.per_axis([3, 2], "window") == (3, 2)
    for value in ((1, 2, 3), (1.5, 2), (True, 1)):
        with pytest.raises(ArgumentError, match=r"^window: expected one integer, or 2"):
            grid.per_axis(value, "window")


def test_check_tokens():
    Grid(4, 5).check_tokens(20, "x")
    with pytest.raises(ArgumentError, match=r"^x: expected 20 tokens, the size of Grid\(4, 5\), got 21\."):
        Grid(4, 5).check_tokens(21, "x")
