"""Patterns between a grid and a coarser one: against the definition, lowered, and with phantoms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.coarse import Around, PaddedAround, Within
from foveate.patterns.lower import lower


def definition(grid, cell, reach):
    """Brute force over coordinates."""
    coarse = Grid(*(-(-n // c) for n, c in zip(grid, cell, strict=True)))
    own = grid.coords() // torch.tensor(cell)
    return ((own[:, None] - coarse.coords()[None]).abs() <= reach).all(-1)


cases = st.integers(1, 3).flatmap(
    lambda axes: st.tuples(
        st.lists(st.integers(1, 9), min_size=axes, max_size=axes),
        st.lists(st.integers(1, 4), min_size=axes, max_size=axes),
        st.integers(0, 2),
    )
)


@given(cases)
def test_both_are_the_definition_and_transposes_of_each_other(case):
    sizes, cell, reach = case
    grid = Grid(*sizes)
    around, within = Around(grid, cell, reach), Within(grid, cell, reach)
    truth = definition(grid, tuple(cell), reach)
    assert around.dense().equal(truth)
    assert within.dense().equal(truth.T)
    assert lower(around).expand()[0, 0].bool().equal(truth)
    assert lower(within).expand()[0, 0].bool().equal(truth.T)
    for rule, other in zip(around.axes(), within.axes(), strict=True):
        assert rule.transpose().dense().equal(other.dense())


@given(cases)
def test_zero_borders_see_the_same_number_of_keys_everywhere(case):
    sizes, cell, reach = case
    around = Around(Grid(*sizes), cell, reach, "zero")
    wide = around.padded()
    if reach == 0:
        assert wide is None
        assert around.phantoms() == 0
        return
    dense = wide.pattern.dense()
    assert (dense.sum(1) == (2 * reach + 1) ** len(sizes)).all()
    assert lower(wide.pattern).expand()[0, 0].bool().equal(dense)
    real = tuple(slice(reach, -reach) for _ in sizes)
    inner = dense.unflatten(1, wide.key_grid.sizes)[(slice(None), *real)].flatten(1)
    assert inner.equal(around.dense())
    assert around.phantoms() == int(dense.sum() - inner.sum())


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa", "auto"])
def test_attend_counts_phantoms_in_the_denominator(backend):
    grid = Grid(4, 5)
    around = Around(grid, (2, 2), 1, "zero")
    q = torch.randn(1, 2, 20, 8)
    k, v = torch.randn(2, 1, 2, 6, 8).unbind(0)
    wide = around.padded()
    spread = lambda x: torch.nn.functional.pad(x.unflatten(2, (2, 3)), (0, 0, 1, 1, 1, 1)).flatten(2, 3)  # noqa: E731
    truth = torch.nn.functional.scaled_dot_product_attention(
        q, spread(k), spread(v), attn_mask=wide.pattern.dense()
    )
    torch.testing.assert_close(attend(q, k, v, where=around, backend=backend), truth, rtol=1e-4, atol=1e-5)


def test_equal_by_value_and_readable():
    for pattern in (Around((4, 6), 2, 1, "zero"), PaddedAround((4, 6), 2), Within((4, 6), (2, 3), 2)):
        assert eval(repr(pattern)) == pattern
        assert hash(eval(repr(pattern))) == hash(pattern)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Around((4, 4), 0), "cell"),
        (lambda: Around((4, 4), 2, -1), "reach"),
        (lambda: Around((4, 4), 2, 1, "clamp"), "border"),
        (lambda: Within((4, 4), (2, 2, 2)), "cell"),
        (lambda: Around((4, 4), 2).dense(16, 5), "n_k"),
        (lambda: Within((4, 4), 2).dense(5), "n_q"),
        (lambda: PaddedAround((4, 4), 2).dense(16, 4), "n_k"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ArgumentError, match=name):
        make()
