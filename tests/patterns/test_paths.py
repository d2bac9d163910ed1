"""Paths are permutations of every map, and each walks as its name says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns import paths

WALKS = {
    "raster": paths.raster,
    "columns": paths.columns,
    "snake": paths.snake,
    "upright snake": lambda grid: paths.snake(grid, 0),
    "diagonal": paths.diagonal,
    "spiral": paths.spiral,
    "polyline": paths.polyline,
}
grids = st.builds(Grid, st.integers(1, 9), st.integers(1, 9))


def steps(path):
    """Row and column differences between consecutive cells."""
    return path.grid.coords()[path.order].diff(dim=0).abs()


@pytest.mark.parametrize("name", WALKS)
@given(grid=grids)
def test_every_walk_visits_every_cell_once(name, grid):
    path = WALKS[name](grid)
    for walk in (path, path.reversed(), path.mirrored(0), path.mirrored(1)):
        everything = torch.arange(grid.numel)
        assert torch.equal(walk.order.sort().values, everything)
        assert torch.equal(walk.order[walk.inverse], everything)
        assert torch.equal(walk.inverse[walk.order], everything)
        assert len(walk) == grid.numel


@pytest.mark.parametrize(
    ("walk", "order"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("columns", [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
        ("snake", [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]),
        ("upright snake", [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]),
        ("diagonal", [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]),
        ("spiral", [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
        ("polyline", [0, 4, 5, 1, 2, 6, 10, 9, 8, 11, 7, 3]),
    ],
)
def test_walks_over_three_rows_of_four(walk, order):
    assert WALKS[walk](Grid(3, 4)).order.tolist() == order


@given(grid=grids)
def test_snakes_and_spirals_never_jump(grid):
    for name in ("snake", "upright snake", "spiral"):
        assert bool((steps(WALKS[name](grid)).sum(1) == 1).all())
    assert bool((steps(paths.diagonal(grid)) <= 1).all())


@given(side=st.integers(1, 8))
def test_polylines_over_a_square_never_jump(side):
    assert bool((steps(paths.polyline(Grid(side, side))).sum(1) == 1).all())


@given(grid=grids)
def test_columns_are_the_rows_of_the_transposed_map(grid):
    h, w = grid
    ids = torch.arange(h * w).view(h, w)
    assert torch.equal(paths.columns(grid).order, ids.T.flatten())
    flipped = Grid(w, h)
    mirror = ids.T.flatten()[paths.snake(flipped).order]
    assert torch.equal(paths.snake(grid, 0).order, mirror)


@given(grid=grids)
def test_mirrors_and_reversals_undo_themselves(grid):
    path = paths.diagonal(grid)
    assert path.mirrored(0).mirrored(0) == path
    assert path.reversed().reversed() == path
    ids = torch.arange(grid.numel).view(grid.sizes)
    assert torch.equal(path.mirrored(1).order, ids.flip(1).flatten()[path.order])


def test_a_cross_is_rows_and_columns_both_ways():
    grid = Grid(3, 4)
    there, down, back, up = paths.cross(grid)
    assert (there, down) == (paths.raster(grid), paths.columns(grid))
    assert (back, up) == (there.reversed(), down.reversed())
    assert paths.orders(paths.cross(grid)).shape == (4, 12)
    assert torch.equal(paths.inverses(paths.cross(grid))[3], up.inverse)


def test_a_raster_has_any_number_of_axes():
    for grid in (Grid(5), Grid(2, 3, 4)):
        assert torch.equal(paths.raster(grid).order, torch.arange(grid.numel))


def test_equal_walks_are_equal_and_hash_alike():
    one, two = paths.raster(Grid(1, 5)), paths.snake(Grid(1, 5))
    assert one == two
    assert hash(one) == hash(two)
    assert one != paths.raster(Grid(5, 1))
    assert repr(one) == "Path(Grid(1, 5), [0, 1, 2, 3, 4])"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paths.spiral(Grid(4)), "^grid: expected a grid with 2 axes"),
        (lambda: paths.snake(Grid(2, 2), 2), "^axis: expected 1"),
        (lambda: paths.Path(Grid(3), torch.tensor([0, 1, 1])), "^order: expected every id"),
        (lambda: paths.Path(Grid(3), torch.tensor([0, 1])), "^order: expected"),
        (lambda: paths.orders([]), "^paths: expected at least one"),
        (lambda: paths.orders([paths.raster(Grid(2)), paths.raster(Grid(3))]), "^paths: expected"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
