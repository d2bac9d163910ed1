"""Sigmoid attention: what its equations promise."""

import math

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.scored.sigmoid_attention import SigmoidAttention, SigmoidCrossAttention
from foveate.scores.rules import Sigmoid


def qkv(n_q=5, n_k=7, d=8):
    return (torch.randn(2, 3, n, d, dtype=torch.float64, requires_grad=True) for n in (n_q, n_k, n_k))


@pytest.mark.parametrize("n", [4, 64])
def test_zero_queries_give_mass_n_over_n_plus_1(n):
    module = SigmoidAttention(dim=8, heads=2, length=n).double()
    with torch.no_grad():
        module.qkv.weight[:8] = 0
    weights = module.attention_map(torch.randn(1, n, 8, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (n + 1)))
    assert abs(weights[0, 0, 0].sum().item() - n / (n + 1)) < 1e-6  # the bias is a float32 buffer


def test_one_key_changes_one_column():
    module = SigmoidAttention(dim=8, heads=2, logit_bias=-2.0).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 3] += 1
    before, after = module.attention_map(x), module.attention_map(other)
    rows = [i for i in range(6) if i != 3]
    changed = (before - after).abs()[:, :, rows].amax((0, 1, 2)) > 1e-12
    assert changed.tolist() == [i == 3 for i in range(6)]


def test_weights_of_a_prefix_stay_when_the_sequence_grows():
    module = SigmoidAttention(dim=8, heads=2, length=16).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(module.attention_map(x[:, :5]), module.attention_map(x)[:, :, :5, :5])


def test_halves_of_the_keys_add_up():
    q, k, v = qkv()
    rule = Sigmoid(-1.5)
    whole = attend(q, k, v, weigh=rule)
    halves = [attend(q, k[:, :, part], v[:, :, part], weigh=rule) for part in (slice(0, 3), slice(3, None))]
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_gradient_of_the_logits_is_a_times_one_minus_a():
    logits = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    weights, _ = Sigmoid(-1.0).weights(logits)
    upstream = torch.randn_like(weights)
    (got,) = torch.autograd.grad(weights, logits, upstream)
    torch.testing.assert_close(got, weights * (1 - weights) * upstream)
    assert (weights * (1 - weights)).max() <= 0.25


def test_rows_without_keys_are_zero():
    q, k, v = qkv()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out = attend(q, k, v, weigh=Sigmoid(0.0), mask=mask)
    assert out[:, :, 2].eq(0).all()
    assert out[:, :, 1].ne(0).any()


@pytest.mark.parametrize(("row_scale", "power"), [("sqrt", -0.5), ("length", -1.0)])
def test_row_scale_depends_on_the_row(row_scale, power):
    torch.manual_seed(3)
    plain = SigmoidAttention(dim=8, heads=2).double()
    scaled = SigmoidAttention(dim=8, heads=2, row_scale=row_scale).double()
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    factor = torch.arange(1, 7, dtype=torch.float64).pow(power)[:, None]
    # the factors themselves are made in float32
    torch.testing.assert_close(scaled.attention_map(x), plain.attention_map(x) * factor, rtol=1e-6, atol=1e-9)


def test_temperature_comes_before_the_bias():
    module = SigmoidAttention(dim=4, heads=1, logit_bias=-1.0, temperature=math.log(2.0)).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    q, k, _ = module.qkv(x)
    expected = torch.sigmoid(2 * (q @ k.transpose(-1, -2)) / 2 - 1)
    torch.testing.assert_close(module.attention_map(x), expected, rtol=1e-6, atol=1e-9)


def test_causal_alibi_lowers_the_past():
    module = SigmoidAttention(dim=4, heads=1, position="alibi", causal=True).double()
    nn.init.zeros_(module.qkv.weight)
    row = module.attention_map(torch.randn(1, 5, 4, dtype=torch.float64))[0, 0, 4]
    assert (row[1:] > row[:-1]).all()


def test_softmax_is_the_baseline_with_everything_else_equal():
    module = SigmoidAttention(dim=8, heads=2, activation="softmax", logit_bias=-3.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = module.qkv(x)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module(x, Grid(5)), module.proj(plain.transpose(1, 2).flatten(2)))


def test_cross_attention_takes_another_width():
    module = SigmoidCrossAttention(dim=8, heads=2, kv_dim=12, qkv_bias=True)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 12)
    assert module(x, context).shape == (2, 3, 8)
    assert module.attention_map(x, context).shape == (2, 2, 3, 5)
    with pytest.raises(ArgumentError, match="context"):
        module(x, x)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"length": 0}, "length"),
        ({"length": 4, "logit_bias": 0.0}, "length"),
        ({"position": "learned"}, "position"),
        ({"activation": "tanh"}, "activation"),
        ({"row_scale": "cube"}, "row_scale"),
        ({"dim": 6, "position": "rope"}, "rope"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        SigmoidAttention(**{"dim": 8, "heads": 2, **options})
