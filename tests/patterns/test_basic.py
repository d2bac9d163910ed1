"""Sequence patterns and given masks, against plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from tests.patterns.strategies import copy_of, patterns

lengths = st.integers(0, 12)


def by_hand(n_q, n_k, rule):
    return torch.tensor([[rule(i, j) for j in range(n_k)] for i in range(n_q)], dtype=torch.bool).view(
        n_q, n_k
    )


@given(lengths, lengths, st.integers(0, 5), st.integers(0, 5))
def test_dense(n_q, n_k, a, b):
    at = n_k - n_q
    cases = {
        Full(): lambda i, j: True,
        Causal(): lambda i, j: j <= i + at,
        Causal("start"): lambda i, j: j <= i,
        SlidingWindow(a, b): lambda i, j: i + at - a <= j <= i + at + b,
        SlidingWindow(a): lambda i, j: i + at - a <= j <= i + at,
        Sinks(a): lambda i, j: j < a,
    }
    for pattern, rule in cases.items():
        dense = pattern.dense(n_q, n_k)
        assert dense.dtype == torch.bool
        assert torch.equal(dense, by_hand(n_q, n_k, rule)), pattern
        assert torch.equal(pattern.axes(n_q, n_k)[0].dense(), dense), pattern


def test_decoding_sees_everything():
    assert Causal().dense(1, 7).all()
    assert Causal().dense(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert Causal("start").dense(2, 4).tolist() == [[True, False, False, False], [True, True, False, False]]


def test_dense_is_chunked_without_a_trace(monkeypatch):
    whole = SlidingWindow(3, 2).dense(17, 23)
    monkeypatch.setattr("foveate.patterns.pattern._CHUNK", 40)
    assert torch.equal(SlidingWindow(3, 2).dense(17, 23), whole)
    assert torch.equal(Full().dense(17, 23), torch.ones(17, 23, dtype=torch.bool))


def test_explicit():
    mask = torch.rand(5, 7) < 0.5
    pattern = Explicit(mask)
    kept = mask.clone()
    assert torch.equal(pattern.dense(), mask)
    mask.zero_()
    assert torch.equal(pattern.dense(5, 7), kept), "the mask must be copied"
    assert pattern == Explicit(kept)
    assert hash(pattern) == hash(Explicit(kept))
    assert pattern != Explicit(~kept)
    assert copy_of(pattern) == pattern
    big = torch.rand(40, 30) < 0.5
    assert repr(Explicit(big)) == repr(Explicit(big.clone()))
    assert "40x30" in repr(Explicit(big))
    # The same bits in another shape are another mask.
    assert Explicit(torch.ones(2, 3).bool()) != Explicit(torch.ones(3, 2).bool())


@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_block_list(n_q, n_k, a, b, seed):
    table = torch.rand(-(-n_q // a), -(-n_k // b), generator=torch.Generator().manual_seed(seed)) < 0.5
    pattern = BlockList((a, b), table)
    want = by_hand(n_q, n_k, lambda i, j: bool(table[i // a, j // b]))
    assert torch.equal(pattern.dense(n_q, n_k), want)
    same = BlockList((a, b), [tuple(pair) for pair in table.nonzero().tolist()])
    assert same == pattern == copy_of(pattern)
    assert torch.equal(same.dense(n_q, n_k), want)


def test_block_list_refuses_blocks_beyond_the_end():
    with pytest.raises(ArgumentError, match=r"n_k: .*block 3"):
        BlockList(2, [(0, 3)]).dense(6, 6)
    assert not BlockList(2, []).dense(5, 5).any()


@given(st.data())
def test_candidates_hold_every_key(data):
    n_q, n_k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    pattern = data.draw(patterns(n_q, n_k))
    q_ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n_q - 1), min_size=1))))
    got = pattern.candidates(q_ids, n_q, n_k)
    assert got.dtype == torch.long
    assert (got.diff() > 0).all(), "sorted, each key once"
    wanted = pattern.dense(n_q, n_k)[q_ids].any(0).nonzero().flatten()
    assert torch.isin(wanted, got).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Causal("middle"), "align"),  # pyright: ignore
        (lambda: SlidingWindow(-1), "left"),
        (lambda: SlidingWindow(2, True), "right"),
        (lambda: SlidingWindow(2.0), "left"),
        (lambda: Sinks(-3), "n:"),
        (lambda: Explicit(torch.ones(3)), "mask"),
        (lambda: Explicit(torch.ones(3, 3)), "mask"),
        (lambda: BlockList(0, []), "block"),
        (lambda: BlockList((1, 2, 3), []), "block"),
        (lambda: BlockList(2, [(0, -1)]), "pairs"),
        (lambda: BlockList(2, torch.ones(2, 2)), "pairs"),
        (lambda: Full().dense(), "n_q"),
        (lambda: Full().dense(-1), "n_q"),
        (lambda: Full().dense(3, True), "n_k"),
        (lambda: Full().dense(3.0), "n_q"),
        (lambda: Explicit(torch.ones(2, 3).bool()).dense(3, 3), "n_q"),
        (lambda: Explicit(torch.ones(2, 3).bool()).dense(2, 2), "n_k"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
