"""Blocks: pooling, choosing, levels, and the selection of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal
from foveate.routing.blocks import (
    block_count,
    block_sizes,
    causal_blocks,
    choose_above,
    choose_mass,
    choose_top,
    mass_counts,
    pool_blocks,
    rank_levels,
    select_blocks,
    straight_through,
)


@given(n=st.integers(1, 20), size=st.integers(1, 9), how=st.sampled_from(["avg", "max", "min"]))
def test_pooling_is_per_block_also_where_the_last_is_short(n, size, how):
    x = torch.randn(2, n, 3, dtype=torch.float64)
    own = {"avg": lambda t: t.mean(1), "max": lambda t: t.amax(1), "min": lambda t: t.amin(1)}[how]
    torch.testing.assert_close(pool_blocks(x, size, how), torch.stack([own(t) for t in x.split(size, 1)], 1))
    assert block_sizes(n, size).tolist() == [t.shape[1] for t in x.split(size, 1)]


def test_pooling_has_gradients_and_names_what_it_does_not_know():
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    for how in ("avg", "max", "min"):
        assert torch.autograd.gradcheck(lambda t, how=how: pool_blocks(t, 2, how), (x,))
    with pytest.raises(ArgumentError, match="how"):
        pool_blocks(x, 2, "median")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="size"):
        pool_blocks(x, 0)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_causal_blocks_are_those_with_a_visible_pair(n_q, n_k, block_q, block_k, whole):
    dense = Causal().dense(n_q, n_k)
    rows = [
        [bool(t.all() if whole else t.any()) for t in r.split(block_k, 1)] for r in dense.split(block_q, 0)
    ]
    assert causal_blocks(n_q, n_k, block_q, block_k, whole=whole).tolist() == rows


def test_top_blocks_of_every_row():
    scores = torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]])
    assert choose_top(scores, 2).tolist() == [[False, True, True], [True, True, False]]
    allowed = torch.tensor([[True, False, False], [True, True, True]])
    assert choose_top(scores, 2, allowed).tolist() == [[True, False, False], [True, True, False]]
    assert choose_top(scores, 9).all()
    with pytest.raises(ArgumentError, match="k"):
        choose_top(scores, 0)


def test_the_gate_is_hard_forward_and_soft_backward():
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    soft = scores.softmax(-1)
    chosen = choose_top(scores, 2)
    gate = straight_through(soft, chosen)
    torch.testing.assert_close(gate, chosen.double())
    weight = torch.randn_like(soft)
    (got,) = torch.autograd.grad((gate * weight).sum(), scores, retain_graph=True)
    (expected,) = torch.autograd.grad((soft * weight).sum(), scores)
    assert got.equal(expected)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.floats(0, 1))
def test_mass_takes_the_fewest_that_suffice(weights, mass):
    row = torch.tensor(weights, dtype=torch.float64)
    chosen = choose_mass(row, mass)
    count = int(chosen.sum())
    assert row[chosen].sum() >= mass * row.sum() - 1e-9
    if count:
        assert row[chosen].sum() - row[chosen].min() < mass * row.sum() + 1e-9
        assert row[chosen].min() >= row[~chosen].max() if count < len(row) else True
    assert int(mass_counts(row, mass)[0]) == count


def test_all_the_mass_is_everything_that_has_any():
    row = torch.tensor([0.1, 1e-20, 0.9, 0.0])
    assert choose_mass(row, 1.0).tolist() == [True, True, True, False]
    assert choose_mass(row, 1.0, torch.tensor([False, True, True, True])).tolist() == [
        False,
        True,
        True,
        False,
    ]
    with pytest.raises(ArgumentError, match="mass"):
        choose_mass(row, 1.5)


def test_above_a_threshold():
    scores, allowed = torch.tensor([0.1, 0.3, 0.5]), torch.tensor([True, True, False])
    assert choose_above(scores, 0.1).tolist() == [False, True, True]
    assert choose_above(scores, 0.1, allowed).tolist() == [False, True, False]


def test_levels_follow_ranks():
    scores = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert rank_levels(scores, (1, 3), (1, 4)).tolist() == [[1, 0, 4, 4, 0], [0, 0, 4, 4, 1]]
    ends = torch.tensor([[1, 2], [0, 5]])
    assert rank_levels(scores, ends, (1, 4)).tolist() == [[1, 0, 4, 0, 0], [4, 4, 4, 4, 4]]
    allowed = torch.tensor([False, True, True, True, True])
    assert rank_levels(scores, (1, 3), (1, 4), allowed)[0].tolist() == [0, 0, 1, 4, 4]
    with pytest.raises(ArgumentError, match="ends"):
        rank_levels(scores, (1, 2, 3), (1, 4))


def expand(chosen, block_q, block_k, n_q, n_k):
    return chosen.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :n_q, :n_k]


@given(data=st.data(), causal=st.booleans(), rows=st.integers(1, 3), as_ids=st.booleans())
def test_tokens_of_a_block_see_the_tokens_of_its_blocks(data, causal, rows, as_ids):
    n_q, n_k, block_q, block_k = (data.draw(st.integers(1, top)) for top in (13, 17, 5, 5))
    shape = (2, 2, block_count(n_q, block_q), block_count(n_k, block_k))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    chosen = torch.rand(shape) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    given_as = chosen
    if as_ids:
        numbers = torch.arange(shape[3]).expand(shape)
        given_as = torch.where(chosen, numbers, -1)
    selection = select_blocks(given_as, block_q, block_k, n_q, n_k, causal=causal, rows=rows)
    expected = expand(chosen, block_q, block_k, n_q, n_k)
    if causal:
        expected = expected & Causal().dense(n_q, n_k)
    assert selection.dense().expand(expected.shape).equal(expected)
    selection.schedule.validate()


def test_rows_without_blocks_give_zeros():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    chosen = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    chosen[:, :, 1, 0] = True
    out, lse = attend(q, k, v, where=select_blocks(chosen, 3, 3, 9, 9), return_lse=True)
    assert out[:, :, [0, 1, 2, 6, 7, 8]].eq(0).all()
    assert lse[:, :, 0].isneginf().all()
    torch.testing.assert_close(out[:, :, 3:6], attend(q[:, :, 3:6], k[:, :, :3], v[:, :, :3]))
    nothing = select_blocks(torch.zeros_like(chosen), 3, 3, 9, 9)
    assert attend(q, k, v, where=nothing).eq(0).all()


def test_one_full_row_does_not_widen_the_others():
    chosen = torch.eye(32, dtype=torch.bool).expand(1, 4, 32, 32).clone()
    chosen[:, :, -1] = True
    schedule = select_blocks(chosen, 4, 4, 128, 128).schedule
    assert schedule.pairs_computed == schedule.pairs_needed == 4 * (31 + 32) * 16


def test_triangles_are_padded_by_less_than_a_third():
    chosen = causal_blocks(256, 256, 4, 4).expand(1, 1, 64, 64)
    schedule = select_blocks(chosen, 4, 4, 256, 256).schedule
    assert schedule.pairs_computed < 4 / 3 * 16 * int(chosen.sum())
    assert len(schedule.groups) < 16


def test_pooled_keys_stand_where_their_last_token_does():
    chosen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    positions = torch.arange(8), torch.tensor([1, 3, 5, 7])
    selection = select_blocks(chosen, 4, 2, 8, 4, causal=True, positions=positions)
    assert selection.dense()[0, 0].sum(1).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_tables_that_do_not_fit_are_named():
    for chosen in (
        torch.ones(1, 1, 2, 3, dtype=torch.bool),
        torch.ones(1, 2, 2, dtype=torch.bool),
        torch.ones(1, 1, 2, 2, dtype=torch.int32),
    ):
        with pytest.raises(ArgumentError, match="chosen"):
            select_blocks(chosen, 4, 4, 8, 8)
