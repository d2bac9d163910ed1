"""Regions of a grid and the choice among them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.routing.regions import Regions, select_regions, top_regions

GRIDS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(lambda sizes: Grid(*sizes))


@given(grid=GRIDS, data=st.data())
def test_every_token_is_in_one_region(grid, data):
    counts = tuple(data.draw(st.integers(1, size)) for size in grid)
    regions = Regions.of_count(grid, counts)
    ids = regions.tokens[regions.tokens >= 0]
    assert ids.sort().values.tolist() == list(range(grid.numel))
    assert all(got <= asked for got, asked in zip(regions.counts, counts, strict=True))
    assert len(regions.tokens) == regions.numel


@given(grid=GRIDS, data=st.data())
def test_pool_is_the_mean_of_what_is_there(grid, data):
    counts = tuple(data.draw(st.integers(1, size)) for size in grid)
    regions = Regions.of_count(grid, counts)
    x = torch.randn(2, grid.numel, 3, dtype=torch.float64)
    means = [x[:, row[row >= 0]].mean(1) for row in regions.tokens]
    torch.testing.assert_close(regions.pool(x), torch.stack(means, 1))


def test_tokens_see_exactly_the_chosen_regions():
    regions = Regions.of_count(Grid(5, 4), (2, 2))
    chosen = torch.tensor([[[0, 3], [1, 2], [3, 1], [2, 0]]])
    dense = select_regions(regions, chosen).dense()[0, 0]
    region_of = torch.empty(20, dtype=torch.long)
    for r, row in enumerate(regions.tokens):
        region_of[row[row >= 0]] = r
    expected = (chosen[0][region_of][:, :, None] == region_of).any(1)
    assert dense.equal(expected)


def test_top_regions_come_best_first():
    queries = torch.eye(3)[None]
    keys = torch.tensor([[[1.0, 5.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 1.0]]])
    logits, chosen = top_regions(queries, keys, 2)
    assert chosen[0, :2].tolist() == [[2, 1], [2, 0]]
    assert logits[0, 0].tolist() == [3.0, 2.0]
    with pytest.raises(ArgumentError, match="k"):
        top_regions(queries, keys, 4)


def test_counts_and_sizes_are_checked():
    with pytest.raises(ArgumentError, match="count"):
        Regions.of_count(Grid(4, 4), 5)
    with pytest.raises(ArgumentError, match="size"):
        Regions(Grid(4, 4), (2,))
