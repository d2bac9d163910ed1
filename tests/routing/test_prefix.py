"""The best keys of every causal prefix, against sorting each prefix."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.routing.prefix import select_prefix_top, select_smooth


def brute(scores, size, n_q, present=None):
    """True at the best keys of each prefix, later keys first among equals."""
    b, h, n_k = scores.shape
    out = torch.zeros(b, h, n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        for bb in range(b):
            for hh in range(h):
                seen = [j for j in range(n_k - n_q + i + 1) if present is None or present[bb, j]]
                seen.sort(key=lambda j: (-float(scores[bb, hh, j]), -j))
                out[bb, hh, i, seen[:size]] = True
    return out


@pytest.mark.parametrize(
    ("n_q", "n_k", "size", "tile"),
    [(23, 23, 5, 4), (9, 23, 5, None), (1, 40, 7, None), (30, 30, 40, 8), (33, 33, 1, 3)],
)
def test_equal_to_sorting_each_prefix(n_q, n_k, size, tile):
    # Few different values, so that there are ties.
    scores = torch.randint(0, 6, (2, 2, n_k)).float()
    present = torch.rand(2, n_k) < 0.7
    for mask in (None, present):
        found = select_prefix_top(scores, size, n_q=n_q, present=mask, tile=tile)
        found.schedule.validate()
        assert found.dense().equal(brute(scores, size, n_q, mask))


def test_the_choice_does_not_depend_on_tiles_or_on_how_many_queries_ask():
    scores = torch.randn(1, 1, 60)
    whole = select_prefix_top(scores, 9).dense()
    assert select_prefix_top(scores, 9, tile=7).dense().equal(whole)
    for t in (1, 30, 60):
        assert select_prefix_top(scores[..., :t], 9, n_q=1).dense()[..., 0, :].equal(whole[..., t - 1, :t])


def test_a_group_of_rows_shares_its_choice():
    scores = torch.randn(2, 3, 17)
    alone = select_prefix_top(scores, 4).dense()
    shared = select_prefix_top(scores, 4, group=3)
    assert shared.n_q == 51
    assert shared.dense().equal(alone.repeat_interleave(3, dim=2))


def test_equal_scores_give_a_sliding_window_and_many_keys_give_the_causal_mask():
    assert select_prefix_top(torch.ones(1, 1, 50), 6).dense()[0, 0].equal(SlidingWindow(5, 0).dense(50))
    assert select_prefix_top(torch.randn(1, 1, 50), 50).dense()[0, 0].equal(Causal().dense(50))


@pytest.mark.parametrize(("smooth", "n", "group"), [(3, 20, 1), (4, 16, 2), (16, 10, 1)])
def test_smoothing_keeps_blocks_of_which_more_than_half_was_chosen(smooth, n, group):
    scores = torch.randn(2, 2, n)
    chosen = brute(scores, 6, n)
    expected = torch.zeros_like(chosen)
    for first in range(0, n, smooth):
        block = chosen[..., first : first + smooth]
        seen = Causal().dense(n)[:, first : first + smooth].sum(-1, keepdim=True)
        expected[..., first : first + smooth] = 2 * block.sum(-1, keepdim=True) > seen
    expected &= Causal().dense(n)
    found = select_prefix_top(scores, 6, smooth=smooth, group=group)
    assert found.dense().equal(expected.repeat_interleave(group, dim=2))


def test_counts_make_the_same_selection():
    counts = torch.tensor([[[[2, 0], [1, 2], [2, 1]]]])
    found = select_smooth(counts, 2, 3).dense()[0, 0]
    # One of one is more than half, one of two is not; nobody sees beyond its own position.
    assert found.tolist() == [[True, False, False], [False, False, False], [True, True, True]]


def test_cells_grow_linearly_with_the_sequence():
    counts = []
    for n in (512, 1024, 2048):
        schedule = select_prefix_top(torch.randn(1, 1, n), 64).schedule
        assert schedule.pairs_needed == 64 * n - 64 * 63 // 2
        assert schedule.pairs_computed <= 2 * 64 * n
        counts.append((schedule.pairs_computed, schedule.nbytes))
    (p0, m0), (p1, m1), (p2, m2) = counts
    assert (p2 - p1) / (p1 - p0) == pytest.approx(2, rel=0.05)
    assert m2 < 4.5 * m0
    assert m1 < 2.2 * m0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": 0}, "size"),
        ({"n_q": 9}, "n_q"),
        ({"group": 0}, "group"),
        ({"smooth": 0}, "smooth"),
        ({"tile": 0}, "tile"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        select_prefix_top(torch.zeros(1, 1, 8), **{"size": 2, **options})


def test_no_queries_and_no_batch():
    assert select_prefix_top(torch.zeros(1, 1, 8), 2, n_q=0).dense().shape == (1, 1, 0, 8)
    assert select_prefix_top(torch.zeros(0, 1, 8), 2).dense().shape == (0, 1, 8, 8)
