"""The baseline is torch's own attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.baseline.full_attention import FullAttention
from foveate.mechanisms.projections import QKV, merge_heads, split_heads


def test_equals_sdpa():
    x = torch.randn(2, 12, 8)
    for causal in (False, True):
        module = FullAttention(dim=8, heads=2, causal=causal)
        expected = scaled_dot_product_attention(*module.qkv(x), is_causal=causal)
        torch.testing.assert_close(module(x, Grid(3, 4)), module.proj(merge_heads(expected)))


def test_equals_torchs_multihead_attention():
    module, theirs = FullAttention(dim=8, heads=2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = module.qkv.weight.data, module.qkv.bias.data
    theirs.out_proj.load_state_dict(module.proj.state_dict())
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(module(x, Grid(12)), theirs(x, x, x, need_weights=False)[0])


def test_prefill_in_parts_and_steps_equal_the_forward_pass():
    module, x = FullAttention(dim=8, heads=2, causal=True).double(), torch.randn(2, 12, 8).double()
    whole = module(x, Grid(12))
    first, past = module.prefill(x[:, :4])
    second, past = module.prefill(x[:, 4:9], past)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[:, :9])
    for t in range(9, 12):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])
    assert past.k.shape == (2, 2, 12, 4)


def test_decoding_needs_a_causal_module():
    with pytest.raises(ArgumentError, match=r"^causal: expected True to decode"):
        FullAttention(dim=8, heads=2).step(torch.randn(2, 8))


def test_heads_split_and_merge():
    x = torch.randn(2, 5, 6)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 2)
    assert torch.equal(heads[:, 1], x[:, :, 2:4])
    assert torch.equal(merge_heads(heads), x)
    q, k, v = QKV(6, 3)(x)
    assert q.shape == k.shape == v.shape == (2, 3, 5, 2)
