"""Offsets on a grid and spans of a sequence, against their definitions, and in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.grids import Windows
from foveate.patterns.lower import lower
from foveate.patterns.offsets import Offsets, Spans

bounds = st.tuples(st.none() | st.integers(-4, 4), st.none() | st.integers(-4, 4)).filter(
    lambda p: None in p or p[0] <= p[1]
)


def inside(off, low, high):
    return (low is None or off >= low) and (high is None or off <= high)


@given(st.lists(st.tuples(st.integers(1, 5), bounds), min_size=1, max_size=3))
def test_offsets_are_ranges_on_every_axis(axes):
    grid, reach = Grid(*(n for n, _ in axes)), [pair for _, pair in axes]
    where, coords = Offsets(grid, reach), grid.coords().tolist()
    expected = [
        [all(inside(b - a, *r) for a, b, r in zip(q, k, reach, strict=True)) for k in coords] for q in coords
    ]
    assert where.dense().tolist() == expected
    schedule = lower(where)
    assert schedule.product is not None
    assert torch.equal(schedule.expand()[0, 0], where.dense().int())
    assert torch.equal(schedule.transpose().expand()[0, 0], where.dense().int().T)
    assert eval(repr(where)) == where


@given(st.integers(0, 13), st.integers(0, 13), st.integers(1, 5), st.integers(1, 5), bounds)
def test_spans_are_compared_by_number(n_q, n_k, query, key, reach):
    where = Spans(query, key, *reach)
    expected = [[inside(j // key - i // query, *reach) for j in range(n_k)] for i in range(n_q)]
    assert where.dense(n_q, n_k).tolist() == expected
    schedule = lower(where, n_q, n_k)
    assert schedule.product is not None
    assert torch.equal(schedule.expand()[0, 0], where.dense(n_q, n_k).int())
    assert eval(repr(where)) == where


def test_special_cases_have_names_of_their_own():
    assert torch.equal(Spans(4, 4).dense(11), Windows(11, 4).dense())
    assert torch.equal(Spans(1, 1, None, 0).dense(7), Causal().dense(7))
    assert torch.equal(Spans(3, 2, None, None).dense(7, 5), Full().dense(7, 5))
    assert torch.equal(Offsets(9, [(-2, 1)]).dense(), SlidingWindow(2, 1).dense(9))


def test_what_makes_no_sense_is_named():
    for reach in ([(0, 0)], [(0, 0), (1, -1)], [(0, 0), (0, 1.5)], [(0,), (0, 0)]):
        with pytest.raises(ArgumentError, match="reach"):
            Offsets((3, 3), reach)
    with pytest.raises(ArgumentError, match="query"):
        Spans(0, 1)
    with pytest.raises(ArgumentError, match="low"):
        Spans(1, 1, 2, 1)
    with pytest.raises(ArgumentError, match="n_k"):
        Offsets((3, 3), [(0, 0), (0, 0)]).dense(9, 8)
