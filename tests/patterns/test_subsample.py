"""Fewer queries on a grid: the rows that are left, on every path a pattern takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Halo
from foveate.patterns.lower import lower
from foveate.patterns.subsample import Subsampled
from tests.patterns.strategies import copy_of, grid_patterns, halos
from tests.patterns.test_lower import check


def kept_rows(grid, strides):
    every = tuple(slice(None, None, s) for s in strides)
    return torch.arange(grid.numel).reshape(grid.sizes)[every].flatten()


@given(grid_patterns(), st.data())
def test_rows_are_those_of_the_pattern(pattern, data):
    strides = tuple(data.draw(st.integers(1, 4)) for _ in pattern.grid)
    where = Subsampled(pattern, strides)
    want = pattern.dense()[kept_rows(pattern.grid, strides)]
    assert torch.equal(where.dense(), want)
    assert copy_of(where) == where
    closed = where.axes() is not None
    check(lower(where), want, closed=closed)
    dilated = any(axis.dilation > 1 and s > 1 for axis, s in zip(pattern.local, strides, strict=True))
    assert closed or dilated


@given(halos(borders=("zero",)), st.data())
def test_phantoms_are_counted_and_padded(pattern, data):
    strides = tuple(data.draw(st.integers(1, 4)) for _ in pattern.grid)
    where, wide = Subsampled(pattern, strides), pattern.padded()
    if wide is None:
        assert where.padded() is None
        return
    rows = wide.pattern.dense()[kept_rows(pattern.grid, strides)]
    padded = where.padded()
    assert torch.equal(padded.pattern.dense(), rows)
    assert where.phantoms() == int(rows.sum()) - int(where.dense().sum())


@pytest.mark.parametrize("backend", ["auto", "reference", "tiles"])
def test_attends_with_fewer_queries(backend):
    grid = Grid(7, 6)
    k, v = torch.randn(1, 2, 42, 4), torch.randn(1, 2, 42, 3)
    q = torch.randn(1, 4, 42, 4)
    where = Halo(grid, 3, 1, border="zero")
    every = attend(q, k, v, where=where, backend="reference")
    rows = kept_rows(grid, (2, 2))
    found = attend(q[:, :, rows], k, v, where=Subsampled(where, 2), backend=backend)
    torch.testing.assert_close(found, every[:, :, rows])


def test_what_does_not_fit_is_named():
    with pytest.raises(ArgumentError, match=r"^where:"):
        Subsampled(Causal(), 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^stride:"):
        Subsampled(Halo((8, 8), 4, 1), 0)
    with pytest.raises(ArgumentError, match=r"^n_q:"):
        Subsampled(Halo((8, 8), 4, 1), 2).dense(64)
