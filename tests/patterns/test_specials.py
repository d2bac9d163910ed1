"""Special tokens before the grid, against the mask put together by blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.patterns import Causal, Explicit, Full, Halo, Neighborhood, SlidingWindow, with_specials
from tests.patterns.strategies import copy_of, grid_patterns, patterns


@given(grid_patterns(), st.integers(0, 3), st.sampled_from(["all", "isolated"]))
def test_rules_by_blocks(inner, n, rule):
    small, size = inner.dense(), inner.tokens + n
    want = torch.zeros(size, size, dtype=torch.bool) if rule == "isolated" else torch.ones(size, size).bool()
    want[:n, :n] = True
    want[n:, n:] = small
    pattern = with_specials(inner, n, rule)
    assert torch.equal(pattern.dense(), want)
    assert pattern.tokens == size
    assert copy_of(pattern) == pattern


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.data())
def test_a_pattern_as_the_rule(n_q, n_k, n, data):
    inner, rule = data.draw(patterns(n_q, n_k)), data.draw(patterns(n_q + n, n_k + n))
    pattern = with_specials(inner, n, rule)
    got = pattern.dense(n_q + n, n_k + n)
    assert torch.equal(got[n:, n:], inner.dense(n_q, n_k))
    want = rule.dense(n_q + n, n_k + n)
    assert torch.equal(got[:n], want[:n])
    assert torch.equal(got[:, :n], want[:, :n])


def test_cross_lengths_reach_the_inner_pattern():
    # Positions of the inner tokens: 3 queries at the end of 5 keys.
    got = with_specials(SlidingWindow(1), 2).dense(5, 7)
    assert torch.equal(got[2:, 2:], SlidingWindow(1).dense(3, 5))
    wide = with_specials(Explicit(torch.zeros(2, 3).bool()), 1).dense()
    assert wide.shape == (3, 4)


@given(grid_patterns(), st.integers(0, 3), st.data())
def test_candidates_hold_every_key(inner, n, data):
    pattern = with_specials(inner, n, data.draw(st.sampled_from(["all", "isolated", Causal()])))
    size = pattern.tokens
    q_ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4))))
    got = pattern.candidates(q_ids, size, size)
    assert (got.diff() > 0).all()
    assert torch.isin(pattern.dense()[q_ids].any(0).nonzero().flatten(), got).all()


def test_errors():
    inner = Neighborhood((4, 4), 3)
    with pytest.raises(ArgumentError, match="n:"):
        with_specials(inner, -1)
    with pytest.raises(ArgumentError, match="rule"):
        with_specials(inner, 1, "none")
    with pytest.raises(ArgumentError, match="where"):
        with_specials(3, 1)
    with pytest.raises(ArgumentError, match="n_q: expected 17 tokens, got 16"):
        with_specials(inner, 1).dense(16)
    with pytest.raises(ArgumentError, match="n_q: expected at least the 3 special tokens"):
        with_specials(Full(), 3).dense(2)
    with pytest.raises(UnsupportedError, match="phantom"):
        with_specials(Halo((4, 4), 2, 1, "zero"), 1)
    with pytest.raises(UnsupportedError, match="phantom"):
        with_specials(inner, 1, Halo((1, 17), 1, 1, "zero"))
