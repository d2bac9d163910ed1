"""Levels of blocks: sampling, intervals of rank and of mass, alike keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.routing.blocks import rank_levels
from foveate.routing.levels import (
    alignment,
    check_levels,
    keep_last,
    level_density,
    listed_blocks,
    mass_ends,
    rank_ends,
    rank_lists,
    sample_offsets,
    sampled_importance,
    similar_levels,
)


def test_offsets_are_different_places_even_without_a_generator():
    for block, count in ((8, 2), (8, 8), (7, 3), (1, 1)):
        for generator in (None, torch.Generator().manual_seed(0)):
            places = sample_offsets(block, count, (2, 3), generator=generator)
            assert places.shape[-1] == count
            assert ((places >= 0) & (places < block)).all()
            assert all(len(set(row)) == count for row in places.flatten(0, 1).tolist())
    assert sample_offsets(32, 8).flatten().tolist() == [2, 6, 10, 14, 18, 22, 26, 30]
    with pytest.raises(ArgumentError, match="count"):
        sample_offsets(4, 5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_importance_is_the_largest_relative_weight(causal, chunk, monkeypatch):
    monkeypatch.setattr("foveate.routing.levels._CHUNK", chunk)
    q, k = torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8)
    generator = torch.Generator().manual_seed(1)
    q_at, k_at = (sample_offsets(4, 2, (2, heads), generator=generator) for heads in (4, 2))
    found = sampled_importance(q, k, 4, 4, q_offsets=q_at, k_offsets=k_at, causal=causal)
    for b in range(2):
        for h in range(4):
            rows = (torch.arange(4)[:, None] * 4 + q_at[b, h]).clamp(max=12)
            columns = (torch.arange(4)[:, None] * 4 + k_at[b, h // 2]).clamp(max=12)
            s = q[b, h, rows.flatten()] @ k[b, h // 2, columns.flatten()].T * 8**-0.5
            if causal:
                s = s.masked_fill(columns.flatten() > rows.flatten()[:, None], -1e30)
            s = (s - s.amax(1, keepdim=True)).exp().masked_fill(s < -1e29, 0)
            expected = s.unflatten(0, (4, 2)).unflatten(2, (4, 2)).amax((1, 3))
            torch.testing.assert_close(found[b, h], expected)
    if not causal:
        torch.testing.assert_close(found.amax(-1), torch.ones(2, 4, 4))


def test_sampling_everything_finds_the_best_pair():
    q, k = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    every = sample_offsets(4, 4)
    found = sampled_importance(q, k, 4, 4, q_offsets=every, k_offsets=every)
    logits = q @ k.transpose(-1, -2) / 2
    best = (logits - logits.amax(-1, keepdim=True)).exp().unflatten(2, (2, 4)).unflatten(4, (2, 4))
    torch.testing.assert_close(found, best.amax((3, 5)))


def test_ranks_are_rounded_to_tiles_and_down_at_the_end():
    shares = {1: 0.1, 2: 0.25, 4: 0.5, 8: 0.8}
    assert rank_ends(20, shares) == [2, 5, 10, 16]
    assert rank_ends(20, shares, {4: 3, 8: 4}) == [2, 5, 11, 19]
    assert rank_ends(10, {1: 0.2, 8: 1.0}, {8: 3}) == [2, 8]
    assert rank_ends(10, {1: 0.0, 2: 1.0}) == [0, 10]
    assert alignment(shares, 128, 32) == {1: 1, 2: 1, 4: 1, 8: 2}
    assert alignment(shares, 32, 32) == {1: 1, 2: 2, 4: 4, 8: 8}


def test_mass_ends_go_one_block_past_the_share():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 0.0]])
    assert mass_ends(scores, {1: 0.7, 2: 0.9}, least=0.0).tolist() == [[3, 4], [1, 1]]
    assert mass_ends(scores, {1: 0.1}, least=0.5).tolist() == [[3], [3]]
    assert mass_ends(torch.zeros(1, 4), {1: 0.5}).tolist() == [[4]]


@given(st.integers(1, 12), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_lists_hold_the_blocks_of_every_level(n, cuts):
    ends = torch.tensor(sorted(min(c, n) for c in cuts))
    scores = torch.rand(2, 3, n)
    levels = rank_levels(scores, ends, list(range(1, len(ends) + 1)))
    lists = rank_lists(scores, ends)
    assert lists.shape == (2, 3, n + len(ends))
    for row, level in zip(lists.flatten(0, 1).tolist(), levels.flatten(0, 1), strict=True):
        for number in range(1, len(ends) + 1):
            part, row = row[: row.index(-1)], row[row.index(-1) + 1 :]
            assert set(part) == set((level == number).nonzero().flatten().tolist())


def test_alike_keys_may_be_pooled_further():
    torch.manual_seed(0)
    one = torch.randn(1, 1, 1, 8)
    k = torch.cat([one.expand(1, 1, 16, 8), torch.randn(1, 1, 15, 8)], dim=2)
    k[:, :, 16:24:2] = k[:, :, 17:25:2]  # pairs alike
    found = similar_levels(k, 16, {2: 0.99, 4: 0.99, 8: 0.99})
    assert found.tolist() == [[[8, 1]]]
    assert similar_levels(k, 16, {2: 0.3, 8: 0.9}).tolist() == [[[8, 2]]]
    with pytest.raises(ArgumentError, match="block"):
        similar_levels(k, 12, {8: 0.5})


def test_small_helpers():
    levels = torch.tensor([[0, 1, 2, 4, 8]])
    assert level_density(levels) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8) / 5)
    assert keep_last(levels, 17, 16).tolist() == [[0, 1, 2, 1, 1]]
    assert keep_last(levels, 0, 16).tolist() == levels.tolist()
    assert listed_blocks(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [
        [0, 2],
        [1, -1],
    ]
    assert listed_blocks(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0)
    check_levels({1: 0.0, 8: 0.0}, 16)
    with pytest.raises(ArgumentError, match="levels"):
        check_levels({-1: 0.0}, 16)
