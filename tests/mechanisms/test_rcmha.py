"""RCMHA: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.rcmha import RelativeConvolutionalAttention
from foveate.patterns.basic import Causal


def layer(dim=12, heads=3, max_distance=24, **options):
    module = RelativeConvolutionalAttention(dim=dim, heads=heads, max_distance=max_distance, **options)
    with torch.no_grad():
        for parameter in (module.table, module.offset_bias, module.query_bias):
            nn.init.normal_(parameter)
    return module.double()


def no_convolution(module):
    with torch.no_grad():
        for part in (module.query_conv, module.key_conv, module.value_conv):
            part.weight.zero_()
            part.weight[..., -1] = 1
            part.bias.zero_()
    return module


def tokens(n, dim=12, batch=2):
    return torch.randn(batch, n, dim).double()


def transformer_xl(module, x, memory):
    """Transformer-XL's relative attention as a loop over pairs."""
    whole = torch.cat([memory, x], dim=1)
    q = split_heads(module.query(x), module.heads)
    k, v = (split_heads(project(whole), module.heads) for project in (module.key, module.value))
    n_q, n_k = q.shape[2], k.shape[2]
    logits = torch.full((x.shape[0], module.heads, n_q, n_k), float("-inf")).double()
    for i in range(n_q):
        at = i + n_k - n_q
        for j in range(n_k if not module.causal else at + 1):
            row = module.max_distance + j - at
            content = ((q[:, :, i] + module.query_bias) * k[:, :, j]).sum(-1)
            logits[:, :, i, j] = content + (q[:, :, i] * module.table[row]).sum(-1) + module.offset_bias[row]
    return module.proj(merge_heads((logits * q.shape[-1] ** -0.5).softmax(-1) @ v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("n_memory", [0, 5])
def test_with_an_idle_convolution_it_is_transformer_xl(causal, official, n_memory):
    module = no_convolution(layer(causal=causal, official=official))
    x, memory = tokens(7), tokens(n_memory)
    torch.testing.assert_close(module(x, Grid(7), memory=memory), transformer_xl(module, x, memory))


def test_without_position_terms_it_is_plain_attention_with_memory():
    module = no_convolution(layer())
    with torch.no_grad():
        for parameter in (module.table, module.offset_bias, module.query_bias):
            parameter.zero_()
    x, memory = tokens(6), tokens(4)
    whole = torch.cat([memory, x], dim=1)
    q, (k, v) = module.query(x), (module.key(whole), module.value(whole))
    out = attend(*(split_heads(y, 3) for y in (q, k, v)), where=Causal())
    torch.testing.assert_close(module(x, Grid(6), memory=memory), module.proj(merge_heads(out)))
    fresh = RelativeConvolutionalAttention(dim=12, heads=3)
    assert not any(p.any() for p in (fresh.table, fresh.offset_bias, fresh.query_bias))


def test_convolutions_look_back_only_and_are_shared_by_heads():
    module, x = layer(causal=False), tokens(9)
    changed = x.clone()
    changed[:, 4] += 1
    for a, b in zip(module._convolved(x, None), module._convolved(changed, None), strict=True):
        moved = (a - b).abs().amax((0, 1, 3)) > 1e-9
        assert moved.nonzero().flatten().tolist() == [4, 5, 6]
    assert module.key_conv.weight.shape == (4, 1, 3)
    long = layer(kernel=5, causal=False)
    moved = (long._convolved(x, None)[1] - long._convolved(changed, None)[1]).abs().amax((0, 1, 3)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_the_causal_layer_does_not_see_later_tokens():
    module, x = layer(), tokens(10)
    changed = x.clone()
    changed[:, 6:] += torch.randn(2, 4, 12).double()
    torch.testing.assert_close(module(changed, Grid(10))[:, :6], module(x, Grid(10))[:, :6])


def test_the_same_distance_reads_the_same_row_with_and_without_memory():
    module = no_convolution(layer())
    with torch.no_grad():
        module.offset_bias.zero_()
        module.table.zero_()
        module.query_bias.zero_()
        module.offset_bias[24 - 3] = 50.0
    for n_memory, n in ((0, 9), (5, 4)):
        weights = module.attention_map(tokens(n), memory=tokens(n_memory))
        for i in range(n):
            at = i + n_memory
            if at >= 3:
                assert (weights[:, :, i, at - 3] > 0.99).all()


def test_a_text_cut_in_two_equals_the_whole_but_for_the_queries_of_the_authors_code():
    x, grid = tokens(12), Grid(12)
    right = layer()
    torch.testing.assert_close(right(x[:, 7:], Grid(5), memory=x[:, :7]), right(x, grid)[:, 7:])
    theirs = layer(official=True)
    whole, cut = theirs(x, grid)[:, 7:], theirs(x[:, 7:], Grid(5), memory=x[:, :7])
    # Two queries have a convolution that reaches over the cut.
    assert not torch.isclose(cut[:, :2], whole[:, :2]).all()
    torch.testing.assert_close(cut[:, 2:], whole[:, 2:])


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_prefill_and_steps_equal_the_forward_pass(kernel):
    module, x = layer(kernel=kernel), tokens(20)
    whole = module(x, Grid(20))
    out, past = module.prefill(x[:, :1])
    torch.testing.assert_close(out, whole[:, :1])
    for first, last in ((1, 3), (3, 12), (12, 17)):
        out, past = module.prefill(x[:, first:last], past)
        torch.testing.assert_close(out, whole[:, first:last])
    for t in range(17, 20):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])


def test_masks_hide_keys_of_memory_and_tokens():
    module = no_convolution(layer())
    x, memory = tokens(5), tokens(4)
    keep = torch.ones(5, 9, dtype=torch.bool)
    keep[:, :2] = False
    torch.testing.assert_close(
        module(x, Grid(5), memory=memory, mask=keep), module(x, Grid(5), memory=memory[:, 2:])
    )


def test_parameters_and_pairs():
    module = RelativeConvolutionalAttention(dim=128, heads=8, max_distance=4096)
    plain = 3 * 128 * 128 + 128 + 128 * 128 + 128
    convolutions, positions = 3 * 16 * 4, 2 * 4096 * 8 * 17 + 128
    assert sum(p.numel() for p in module.parameters()) == plain + convolutions + positions
    pairs = [
        explain((1, 8, n, 16), (1, 8, n, 16), (1, 8, n, 16), where=Causal()).pairs_needed
        for n in (64, 128, 256)
    ]
    assert pairs == [8 * n * (n + 1) // 2 for n in (64, 128, 256)]


def test_low_precision_stays_near():
    module, x = layer(), tokens(16)
    exact = module(x, Grid(16))
    low = module.bfloat16()(x.bfloat16(), Grid(16))
    assert (low.double() - exact).abs().max() < 0.15


def test_bad_arguments_are_named():
    module = layer(max_distance=8)
    with pytest.raises(ArgumentError, match=r"^x:"):
        module(tokens(9), Grid(9))
    with pytest.raises(ArgumentError, match=r"^memory:"):
        module(tokens(4), Grid(4), memory=tokens(3, 11))
    past = module.prefill(tokens(8))[1]
    with pytest.raises(ArgumentError, match=r"^past:"):
        module.step(tokens(1)[:, 0], past)
    with pytest.raises(ArgumentError, match=r"^kernel:"):
        layer(kernel=0)
    with pytest.raises(ArgumentError, match=r"^causal:"):
        layer(causal=False).prefill(tokens(3))
