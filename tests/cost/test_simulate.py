"""Strides worth choosing: the published figures, and the search against trying everything."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.simulate import in_reach, tile_shapes, worth_choosing
from foveate.mechanisms.local.generalized_neighborhood import simulate
from foveate.patterns.grids import Neighborhood

# Grid, window, and per tile size: the fastest stride, its bound.
PUBLISHED = [
    ((32768,), 2048, {"128/128": ((256,), 16.0), "256/128": ((256,), 16.0)}),
    ((256, 256), 80, {"128/128": ((16, 16), 10.24), "256/128": ((16, 16), 10.24)}),
    ((30, 48, 80), (18, 24, 24), {"128/128": ((2, 8, 8), 11.111), "256/128": ((16, 8, 8), 11.111)}),
]


@pytest.mark.parametrize(("sizes", "window", "fastest"), PUBLISHED)
def test_finds_the_published_strides_and_bounds(sizes, window, fastest):
    found = worth_choosing(Neighborhood(sizes, window))
    for name, (stride, bound) in fastest.items():
        last = found[name][-1]
        assert last.stride == stride
        assert last.bound == pytest.approx(bound, abs=1e-3)
        assert last.result.perfect
        # It is the smallest of its kind: whatever shares windows among fewer queries wastes tiles.
        assert not any(choice.result.perfect for choice in found[name][:-1])


@pytest.mark.parametrize(
    ("window", "sparsity"), [((12, 24), 0.92), ((20, 40), 0.77), ((28, 56), 0.55)], ids=str
)
def test_published_sparsities_of_cosmos(window, sparsity):
    where = Neighborhood((44, 80), window, stride=(4, 8))
    (judged,) = worth_choosing(where, query_tile=(4, 8), key_tile=(4, 8), any_stride=False)["4x8/4x8"]
    assert judged.stride == (4, 8)
    assert judged.result.perfect
    assert round(judged.sparsity - 0.0005, 2) == sparsity
    assert worth_choosing(where, query_tile=(4, 8), key_tile=(4, 8))["4x8/4x8"][-1].bound == judged.bound


@given(st.data())
def test_no_stride_is_better_with_fewer_queries_a_window(data):
    ndim = data.draw(st.integers(1, 2))
    sizes = [data.draw(st.integers(2, 14)) for _ in range(ndim)]
    windows = [data.draw(st.integers(1, n)) for n in sizes]
    dilations = [data.draw(st.integers(1, n // w)) for n, w in zip(sizes, windows, strict=True)]
    causal = data.draw(st.booleans())
    where = Neighborhood(Grid(*sizes), windows, dilations, 1, causal)
    (choices,) = worth_choosing(where, tile_sizes=[(4, 2)]).values()
    dealt = Grid(*(-(-n // d) for n, d in zip(sizes, dilations, strict=True)))
    every = {}
    for stride in itertools.product(*(range(1, w + 1) for w in windows)):
        strided = Neighborhood(where.grid, windows, dilations, stride, causal)
        tiles = itertools.product(tile_shapes(dealt, 4), tile_shapes(dealt, 2))
        every[stride] = max(simulate(strided, q, k).bound for q, k in tiles)
    best = 0.0
    for volume in sorted({math.prod(stride) for stride in every}):
        here = max(bound for stride, bound in every.items() if math.prod(stride) == volume)
        kept = [c for c in choices if math.prod(c.stride) == volume]
        if here > best * (1 + 1e-12):
            best = here
            (choice,) = kept
            assert choice.bound == pytest.approx(here)
            assert choice.result == simulate(
                Neighborhood(where.grid, windows, dilations, choice.stride, causal),
                choice.query_tile,
                choice.key_tile,
            )
        else:
            assert not kept


def test_shapes_of_tiles():
    assert tile_shapes(Grid(1000), 128) == [(128,)]
    assert tile_shapes(Grid(256, 4), 16) == [(4, 4), (8, 2), (16, 1)]
    # A grid smaller than the tile is one tile.
    assert tile_shapes(Grid(3, 5), 128) == [(4, 8)]


def test_what_is_in_reach_and_what_does_not_fit():
    assert "6.25% of the dense pairs: 16x is in reach" in in_reach(Neighborhood(32768, 2048))
    where = Neighborhood((16, 16), 4)
    with pytest.raises(ArgumentError, match="both or neither"):
        worth_choosing(where, query_tile=4)
    with pytest.raises(ArgumentError, match=r"^key_tile:"):
        worth_choosing(where, query_tile=4, key_tile=(4, 0))
    with pytest.raises(ArgumentError, match=r"^query_tile:"):
        worth_choosing(where, query_tile=(4, 4, 4), key_tile=4)
