"""The algebra of patterns: dense masks, normal forms, and when an intersection stays separable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.patterns import And, Causal, Full, Halo, Lattice, Neighborhood, Or, Sinks, SlidingWindow, Windows
from tests.patterns.strategies import grid_patterns, grids, patterns
from tests.patterns.test_grids import product


@given(st.data())
def test_operators_are_boolean(data):
    n_q, n_k = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    a, b = data.draw(patterns(n_q, n_k)), data.draw(patterns(n_q, n_k))
    x, y = a.dense(n_q, n_k), b.dense(n_q, n_k)
    assert torch.equal((a & b).dense(n_q, n_k), x & y)
    assert torch.equal((a | b).dense(n_q, n_k), x | y)
    assert torch.equal((~a).dense(n_q, n_k), ~x)
    axes = (a & b).axes(n_q, n_k)
    if axes is not None:
        assert torch.equal(product(axes), x & y)


@given(grids().flatmap(lambda g: st.tuples(grid_patterns(g), grid_patterns(g))))
def test_intersections_on_one_grid(pair):
    a, b = pair
    axes = (a & b).axes()
    steps = [(x.step, y.step) for x, y in zip(a.axes(), b.axes(), strict=True)]
    if all(x == y or 1 in (x, y) for x, y in steps):
        assert axes is not None, "equal steps, or one of 1, must stay separable"
    if axes is not None:
        assert torch.equal(product(axes), a.dense() & b.dense())


def test_separability():
    grid = (6, 8)
    assert (Neighborhood(grid, 3) & Windows(grid, 2)).axes() is not None
    assert (Neighborhood(grid, 3, 2) & Windows(grid, 4)).axes() is not None
    assert (Neighborhood(8, 5) & Causal()).axes() is not None
    assert (Neighborhood(grid, 3) & Causal()).axes() is None
    assert (Neighborhood(grid, 3) | Windows(grid, 2)).axes() is None
    assert (~Neighborhood(grid, 3)).axes() is None


def test_normal_forms():
    a, b = SlidingWindow(3), Sinks(2)
    assert a & Full() is a
    assert Full() & a is a
    assert Full() & Full() == Full()
    assert ~~a is a
    assert a & a is a
    assert a | a is a
    assert a & b == b & a
    assert hash(a | b) == hash(b | a)
    assert (a & b) != (a | b)
    assert (a & b & Causal()) == And(a, b, Causal())
    assert (a | b) | Causal() == Or(a, b, Causal())


def test_lengths_must_fit_every_part():
    with pytest.raises(ArgumentError, match="n_q"):
        (Neighborhood((4, 4), 3) & Windows((5, 5), 2)).dense()
    with pytest.raises(ArgumentError, match="parts"):
        And(Full())


@pytest.mark.parametrize(
    "combine",
    [lambda p: p & Lattice((4, 4), 2), lambda p: Causal() | p, lambda p: ~p],
    ids=["and", "or", "not"],
)
def test_phantoms_have_no_place_in_the_algebra(combine):
    with pytest.raises(UnsupportedError, match="border='mask'"):
        combine(Halo((4, 4), 2, 1, "zero"))
