"""The true attention map, pooled per block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate.routing.truth as truth
from foveate.core.errors import ArgumentError
from foveate.patterns.basic import Causal
from foveate.routing.blocks import choose_top
from foveate.routing.truth import block_recall, block_weights


@given(data=st.data(), causal=st.booleans(), groups=st.sampled_from([1, 2]))
def test_equals_the_exact_max_pool_of_the_map(data, causal, groups):
    n_q, n_k, block_q, block_k = (data.draw(st.integers(1, top)) for top in (11, 13, 4, 4))
    q = torch.randn(2, 4, n_q, 5, dtype=torch.float64)
    k = torch.randn(2, 4 // groups, n_k, 5, dtype=torch.float64)
    logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * 5**-0.5
    if causal:
        logits = logits.masked_fill(~Causal().dense(n_q, n_k), float("-inf"))
    weights = logits.softmax(-1).nan_to_num()
    expected = [[tile.amax((2, 3)) for tile in row.split(block_k, 3)] for row in weights.split(block_q, 2)]
    expected = torch.stack([torch.stack(row, -1) for row in expected], 2)
    torch.testing.assert_close(block_weights(q, k, block_q, block_k, causal=causal), expected)


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    q, k = torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    whole = block_weights(q, k, 4, 8, causal=True)
    held = []
    monkeypatch.setattr(truth, "_ENTRIES", 4 * 50)
    rows = truth._rows
    monkeypatch.setattr(truth, "_rows", lambda *a: (held.append(r.shape[2]) or r for r in rows(*a)))
    torch.testing.assert_close(block_weights(q, k, 4, 8, causal=True), whole)
    assert max(held) == 4


def test_recall_is_the_share_of_the_chosen_blocks():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(block_recall(weights, chosen), torch.tensor([0.7, 1.0]))
    assert block_recall(weights, choose_top(weights, 3)).eq(1).all()


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ArgumentError, match="k"):
        block_weights(torch.randn(1, 4, 8, 4), torch.randn(1, 3, 8, 4), 2, 2)
