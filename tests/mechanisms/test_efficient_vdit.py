"""Efficient-vDiT: every 'works when' statement of its description."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.local.efficient_vdit import (
    TileAttention,
    attention_tile,
    reference_frames,
    search_mask,
)
from foveate.patterns.basic import Full
from foveate.patterns.grids import Windows


def tensors(n, seed=0, heads=2, d=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, n, d, dtype=torch.float64, generator=generator) for _ in range(3))


@given(st.integers(1, 20), st.data())
def test_reference_frames_are_spread_evenly(frames, data):
    k = data.draw(st.integers(0, frames))
    chosen = reference_frames(frames, k)
    assert len(set(chosen)) == k
    assert all(0 <= f < frames for f in chosen)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_no_references_are_frames_by_themselves_and_all_are_full_attention():
    grid = Grid(5, 2, 3)
    assert torch.equal(attention_tile(grid, 0).dense(30), Windows(grid, (1, 2, 3)).dense())
    assert torch.equal(attention_tile(grid, 5).dense(30), Full().dense(30))
    q, k, v = tensors(30)
    torch.testing.assert_close(attend(q, k, v, where=attention_tile(grid, 5)), attend(q, k, v))


@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.data())
def test_the_mask_is_the_equation(frames, space, bidirectional, data):
    k = data.draw(st.integers(0, frames))
    chosen = reference_frames(frames, k)
    n = frames * space
    want = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            own, other = i // space, j // space
            want[i, j] = own == other or other in chosen or (bidirectional and own in chosen)
    mask = attention_tile(Grid(frames, space), k, bidirectional=bidirectional).dense(n)
    assert torch.equal(mask, want)
    if not bidirectional:
        assert mask.double().mean().item() == pytest.approx((k + 1 - k / frames) / frames)


def test_cost_is_linear_in_frames():
    space, k, counts = 12, 3, []
    for frames in (16, 32, 64):
        shape = (1, 2, frames * space, 4)
        e = explain(shape, shape, shape, where=attention_tile(Grid(frames, 3, 4), k), backend="tiles")
        assert e.pairs_computed == e.pairs_needed == 2 * space**2 * (frames * (k + 1) - k)
        counts.append(e.pairs_needed)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize("references", [0, 1, 2, 3, 5])
def test_repeated_frames_make_every_mask_exact(references):
    grid, (q, _, _) = Grid(6, 7), tensors(42)
    k, v = (x.repeat(1, 1, 6, 1) for x in tensors(7, seed=1)[:2])
    where = attention_tile(grid, references)
    torch.testing.assert_close(attend(q, k, v, where=where), attend(q, k, v), rtol=1e-12, atol=1e-12)


def test_the_search_is_monotone_and_reaches_both_ends():
    grid = Grid(6, 4)
    samples = [tensors(24, seed=s) for s in range(3)]
    found = [search_mask(samples, grid, r) for r in (0.0, 1e-3, 1e-2, 3e-2, 1e-1, math.inf)]
    numbers = [choice.references for choice in found]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 2
    assert numbers[0] == 6
    assert found[0].error == 0.0
    assert torch.equal(found[0].where.dense(24), Full().dense(24))
    assert numbers[-1] == 0
    for choice, r in zip(found, (0.0, 1e-3, 1e-2, 3e-2, 1e-1, math.inf), strict=True):
        assert choice.error <= r
        # Every sparser mask is worse than the threshold allows.
        assert all(error > r for k, error in choice.errors if k < choice.references)


def test_the_search_measures_the_layers_output():
    grid, sample = Grid(4, 3), tensors(12)
    choice = search_mask([sample], grid, math.inf, candidates=[1])
    q, k, v = sample
    gap = attend(q, k, v, where=attention_tile(grid, 1)) - attend(q, k, v)
    assert choice.error == pytest.approx(gap.square().mean().item())
    assert [k for k, _ in choice.errors] == [1, 4]
    doubled = search_mask([sample], grid, math.inf, candidates=[1], project=lambda out: 2 * out)
    assert doubled.error == pytest.approx(4 * choice.error)


def test_repeated_frames_are_found_by_the_search():
    grid, (q, _, _) = Grid(6, 7), tensors(42)
    k, v = (x.repeat(1, 1, 6, 1) for x in tensors(7, seed=1)[:2])
    assert search_mask([(q, k, v)], grid, 1e-20).references == 0


def test_the_mask_does_not_depend_on_data_and_short_videos_are_full():
    module = TileAttention(dim=8, heads=2, references=3)
    assert module.where(Grid(8, 4)) == module.where(Grid(8, 4)) == attention_tile(Grid(8, 4), 3)
    assert torch.equal(module.where(Grid(2, 4)).dense(8), Full().dense(8))


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match=r"^references:"):
        TileAttention(dim=8, heads=2, references=-1)
    with pytest.raises(ArgumentError, match=r"^references:"):
        attention_tile(Grid(4, 4), 5)
    with pytest.raises(ArgumentError, match=r"^samples:"):
        search_mask([], Grid(4, 4), 0.1)
    with pytest.raises(ArgumentError, match=r"^threshold:"):
        search_mask([tensors(16)], Grid(4, 4), math.nan)
