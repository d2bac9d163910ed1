"""Packed sequences: the mask is equality of segment ids, whatever their order and lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.patterns import Causal, Segments, SlidingWindow


def by_ids(q, k):
    same = q[:, None, :, None] == k[:, None, None, :]
    return same & (q >= 0)[:, None, :, None] & (k >= 0)[:, None, None, :]


@st.composite
def ids(draw, rows):
    n = draw(st.integers(0, 20))
    values = st.integers(-2, draw(st.integers(0, 12)))
    return torch.tensor(
        [draw(st.lists(values, min_size=n, max_size=n)) for _ in range(rows)], dtype=torch.long
    ).view(rows, n)


@given(st.integers(1, 3).flatmap(ids))
def test_self(q):
    where = Segments(q)
    assert torch.equal(where.dense(), by_ids(q, q))
    pairs = sum(int(cell.allowed().sum()) for cell in where.cells)
    assert pairs == int(by_ids(q, q).sum()), "each pair once"


@given(st.integers(1, 3).flatmap(lambda b: st.tuples(ids(b), ids(b))))
def test_cross(both):
    q, k = both
    where = Segments(q, k)
    assert (where.n_q, where.n_k) == (q.shape[1], k.shape[1])
    assert torch.equal(where.dense(), by_ids(q, k))
    assert sum(int(cell.allowed().sum()) for cell in where.cells) == int(by_ids(q, k).sum())


@given(st.integers(1, 3).flatmap(ids))
def test_packed_causal(q):
    got = (Segments(q) & Causal()).dense()
    assert torch.equal(got, by_ids(q, q) & Causal().dense(q.shape[1]))
    assert torch.equal(got, (Causal() & Segments(q)).dense())


def test_one_row_of_keys_serves_all_queries():
    q, k = torch.tensor([[0, 1, 1], [1, 0, -1]]), torch.tensor([[1, 0, 0, 2]])
    assert torch.equal(Segments(q, k).dense(), by_ids(q, k.expand(2, -1)))


def test_ids_need_not_be_contiguous_small_or_long():
    q = torch.tensor([[7, 10**12, 7, 10**12, -5]])
    assert torch.equal(Segments(q).dense(), by_ids(q, q))
    assert torch.equal(Segments(q.clamp(max=9).int()).dense(), by_ids(q.clamp(max=9), q.clamp(max=9)))


def test_ragged_lengths_waste_little():
    # One long and many short segments: short ones must not be padded to the long one's length.
    lengths = [512] + [8] * 64
    q = torch.repeat_interleave(torch.arange(65), torch.tensor(lengths))[None]
    where = Segments(q)
    computed = sum(cell.q_ids.numel() * cell.k_ids.shape[-1] for cell in where.cells)
    assert computed == 512**2 + 64 * 8**2


def test_a_pattern_narrows_long_segments():
    q = torch.repeat_interleave(torch.arange(3), torch.tensor([1000, 24, 300]))[None]
    where = Segments(q) & SlidingWindow(31)
    assert torch.equal(where.dense(), by_ids(q, q) & SlidingWindow(31).dense(1324))
    computed = sum(cell.q_ids.numel() * cell.k_ids.shape[-1] for cell in where.cells)
    assert computed < 1.2 * 1324 * (31 + 64)
    # Short segments must not grow to the size of a tile.
    short = Segments(torch.arange(40)[None] // 4) & Causal()
    assert sum(cell.q_ids.numel() * cell.k_ids.shape[-1] for cell in short.cells) == 10 * 4 * 4


def test_nothing_but_padding():
    assert not Segments(torch.full((2, 3), -1)).dense().any()
    nobody = torch.zeros(0, 3).long()
    assert Segments(nobody).dense().shape == (Segments(nobody) & Causal()).dense().shape == (0, 1, 3, 3)


def test_errors():
    with pytest.raises(ArgumentError, match="q_ids"):
        Segments(torch.zeros(3).long())
    with pytest.raises(ArgumentError, match="q_ids"):
        Segments(torch.zeros(1, 3))
    with pytest.raises(ArgumentError, match="k_ids"):
        Segments(torch.zeros(1, 3).long(), torch.zeros(1, 3).bool())
    with pytest.raises(ArgumentError, match="k_ids"):
        Segments(torch.zeros(2, 3).long(), torch.zeros(3, 3).long())
    with pytest.raises(ArgumentError, match="q_ids"):
        Segments([[0, 1]])
