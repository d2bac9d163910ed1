"""GNA: every 'works when' statement of its description, and the published figures of its simulator."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.local.generalized_neighborhood import (
    GeneralizedNeighborhoodAttention,
    block_sparse_strides,
    simulate,
)
from foveate.patterns.grids import Neighborhood, Windows


@st.composite
def strided(draw, causal=False, rank=None):
    rank = rank or draw(st.integers(1, 2))
    sizes = [draw(st.integers(1, 26 if rank == 1 else 9)) for _ in range(rank)]
    windows = [draw(st.integers(1, n)) for n in sizes]
    dilations = [draw(st.integers(1, n // w)) for n, w in zip(sizes, windows, strict=True)]
    strides = [draw(st.integers(1, w)) for w in windows]
    return Neighborhood(Grid(*sizes), windows, dilation=dilations, stride=strides, causal=causal)


def by_the_book(n, window, stride, dilation, causal):
    """The mask of one axis, from the equations of the paper, position by position."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        g, p = i % dilation, i // dilation
        length = math.ceil((n - g) / dilation)
        if causal:
            leader = min(p // stride * stride + stride - 1, length - 1)
            keys = range(max(leader - (window - 1), 0), p + 1)
        else:
            leader = min(p // stride * stride + stride // 2, length - 1)
            start = min(max(leader - window // 2, 0), length - window)
            keys = range(start, start + window)
        mask[i, [t * dilation + g for t in keys]] = True
    return mask


@given(strided(rank=1), st.booleans())
def test_one_axis_is_the_papers_equation(where, causal):
    (n,), (w,), (s,), (d,) = where.grid, where.window, where.stride, where.dilation
    ours = Neighborhood(where.grid, w, dilation=d, stride=s, causal=causal).dense()
    assert torch.equal(ours, by_the_book(n, w, s, d, causal))


@given(strided())
def test_stride_one_is_neighborhood_attention_and_full_window_is_full(where):
    plain = Neighborhood(where.grid, where.window, dilation=where.dilation)
    assert torch.equal(
        Neighborhood(where.grid, where.window, dilation=where.dilation, stride=1).dense(), plain.dense()
    )
    for s in range(1, min(where.grid) + 1):
        assert Neighborhood(where.grid, where.grid.sizes, stride=s).dense().all()


@pytest.mark.parametrize(("sizes", "window"), [((24,), (6,)), ((8, 12), (4, 3))])
def test_stride_of_a_window_is_blocked_attention(sizes, window):
    ours = Neighborhood(Grid(*sizes), window, stride=window).dense()
    assert torch.equal(ours, Windows(Grid(*sizes), window).dense())


def test_the_last_partial_block_sees_a_whole_window():
    mask = Neighborhood(Grid(10), 4, stride=4).dense()
    assert mask[9].nonzero().flatten().tolist() == [6, 7, 8, 9]


@given(strided())
def test_a_stride_group_shares_its_keys(where):
    mask = where.dense()
    assert (mask.sum(1) == math.prod(where.window)).all()
    coords = where.grid.coords()
    stride, dilation = torch.tensor(where.stride), torch.tensor(where.dilation)
    label = torch.cat([coords % dilation, coords // dilation // stride], dim=1)
    same = (label[:, None] == label[None]).all(-1)
    for i in range(where.grid.numel):
        assert (mask[same[i]] == mask[i]).all()


@given(strided(causal=True))
def test_causal_never_sees_later_keys_and_ends_at_the_query(where):
    mask = where.dense()
    coords = where.grid.coords()
    later = (coords[None] > coords[:, None]).any(-1)
    assert not (mask & later).any()
    assert mask.diagonal().all()
    assert (mask.sum(1) <= math.prod(where.window)).all()


@pytest.mark.parametrize("n", [12, 13])
def test_dilation_splits_into_sub_grids(n):
    mask = Neighborhood(Grid(n), 4, dilation=3, stride=2).dense()
    for g in range(3):
        own = torch.arange(g, n, 3)
        part = Neighborhood(Grid(len(own)), 4, stride=2).dense()
        assert torch.equal(mask[own][:, own], part)
        assert mask[own].sum() == part.sum()


# Layout, window, stride, query tile, key tile, bound and whether it is fully block-sparse.
PUBLISHED = [
    ((32768,), 2048, 1, 128, 128, 15.114, False),
    ((32768,), 2048, 1, 256, 128, 14.322, False),
    ((32768,), 2048, 192, 128, 128, 14.577, False),
    ((32768,), 2048, 256, 256, 128, 16.0, True),
    ((256, 256), 80, 1, (16, 8), (16, 8), 7.515, False),
    ((256, 256), 80, 1, (16, 16), (16, 8), 7.061, False),
    ((256, 256), 80, 16, (16, 16), (16, 8), 10.24, True),
    ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), (2, 8, 8), 5.440, False),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.111, True),
    ((44, 80), (12, 24), (4, 8), (4, 8), (4, 8), 12.222, True),
    ((44, 80), (20, 40), (4, 8), (4, 8), (4, 8), 4.4, True),
    ((44, 80), (28, 56), (4, 8), (4, 8), (4, 8), 2.245, True),
]


@pytest.mark.parametrize(("sizes", "window", "stride", "tq", "tk", "bound", "perfect"), PUBLISHED)
def test_simulator_gives_the_published_bounds(sizes, window, stride, tq, tk, bound, perfect):
    result = simulate(Neighborhood(Grid(*sizes), window, stride=stride), tq, tk)
    assert result.bound == pytest.approx(bound, abs=6e-4)
    assert result.perfect == perfect


def test_smallest_fully_block_sparse_stride():
    assert block_sparse_strides(Neighborhood(Grid(2048), 512), 64, 32)[0] == 64


def test_aligned_tiles_are_visited_exactly():
    grid, window, stride, tk = Grid(24, 32), (12, 12), (4, 4), (2, 4)
    result = simulate(Neighborhood(grid, window, stride=stride), stride, tk)
    tiles_q = (24 // 4) * (32 // 4)
    assert result.visited == tiles_q * (12 // 2) * (12 // 4)


@given(strided(), st.integers(1, 6), st.integers(1, 6))
def test_simulator_counts_tiles_of_the_dense_mask(where, tq, tk):
    groups = [range(d) for d in where.dilation]
    visited = dense = 0
    perfect = True
    mask = where.dense().reshape(*where.grid.sizes, *where.grid.sizes)
    for group in itertools.product(*groups):
        cut = tuple(slice(g, None, d) for g, d in zip(group, where.dilation, strict=True))
        part = mask[cut + cut]
        sizes = part.shape[: where.grid.ndim]
        spans = [[range(a, min(a + t, n)) for a in range(0, n, t)] for t in (tq, tk) for n in sizes]
        for tile in itertools.product(*spans):
            block = part
            for axis, span in enumerate(tile):
                block = block.narrow(axis, span.start, len(span))
            dense += 1
            visited += bool(block.any())
            perfect &= bool(block.all()) or not bool(block.any())
    result = simulate(where, tq, tk)
    assert (result.visited, result.dense, result.perfect) == (visited, dense, perfect)


def test_stride_wider_than_the_window_is_named():
    module = GeneralizedNeighborhoodAttention(dim=8, heads=2, window=3, stride=4)
    with pytest.raises(ArgumentError, match="stride"):
        module(torch.randn(1, 9, 8), Grid(9))
