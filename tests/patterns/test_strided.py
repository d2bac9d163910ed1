"""Strided groups against their definition, and in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns.basic import Full
from foveate.patterns.grids import Lattice
from foveate.patterns.lower import lower
from foveate.patterns.strided import Strided


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=3))
def test_tokens_of_one_phase_see_one_another(axes):
    grid, stride = Grid(*(n for n, _ in axes)), tuple(s for _, s in axes)
    where, coords = Strided(grid, stride), grid.coords().tolist()
    expected = [
        [all((a - b) % s == 0 for a, b, s in zip(q, k, stride, strict=True)) for k in coords] for q in coords
    ]
    assert where.dense().tolist() == expected
    schedule = lower(where)
    assert schedule.product is not None
    assert torch.equal(schedule.expand()[0, 0], where.dense().int())
    assert eval(repr(where)) == where


def test_where_it_divides_it_is_the_lattice():
    assert torch.equal(Strided((4, 6), 2).dense(), Lattice((4, 6), (2, 3)).dense())
    assert torch.equal(Strided((3, 4), 1).dense(), Full().dense(12))
    assert torch.equal(Strided((3, 4), 9).dense(), torch.eye(12, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="stride"):
        Strided((3, 4), 0)
