"""SSA: what its equations promise."""

import math

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.select import watch_plans
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.selective_self_attention import SelectiveSelfAttention
from foveate.patterns.basic import Causal
from foveate.scores.temperature import RowFactor


def layer(dim=16, heads=4, **options):
    """A layer whose temperatures are far from 1."""
    module = SelectiveSelfAttention(dim=dim, heads=heads, **options).double()
    with torch.no_grad():
        for temperature in (module.q_temperature, module.v_temperature):
            if temperature is not None:
                temperature.weight.normal_(std=2.0)
        if module.position is not None:
            module.position.beta.fill_(-0.5)
    return module


def data(n=10, dim=16, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def plain(module, x):
    q = split_heads(module.q_proj(x), module.heads)
    k, v = (split_heads(p(x), module.kv_heads) for p in (module.k_proj, module.v_proj))
    return module.proj(merge_heads(attend(q, k, v, where=Causal() if module.causal else None)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_temperatures_of_one_are_plain_attention(causal, kv_heads):
    module = layer(causal=causal, kv_heads=kv_heads)
    for temperature in (module.q_temperature, module.v_temperature):
        nn.init.zeros_(temperature.weight)
    nn.init.constant_(module.position.beta, 30.0)  # exp(-exp(30)) = 0
    x = data()
    torch.testing.assert_close(module(x, Grid(10)), plain(module, x))


def test_starts_as_good_as_plain_and_every_temperature_learns_from_there():
    x = data().float()
    for position in ("double_exp", "sigmoid", "linear"):
        module = SelectiveSelfAttention(dim=16, heads=4, position=position)
        torch.testing.assert_close(module(x, Grid(10)), plain(module, x), rtol=0, atol=5e-3)
        module(x, Grid(10)).square().sum().backward()
        new = (module.q_temperature.weight, module.v_temperature.weight, module.position.beta)
        assert all(p.grad.abs().max() > 0 for p in new)


def test_the_first_position_has_no_position_temperature():
    module = layer(tokens=())
    q = torch.zeros(1, 4, 6, 4, dtype=torch.float64)
    factor = module.query_factor(q, 0, 6)[0, 0]
    assert factor[0] == 1
    expected = 1 + math.exp(-math.exp(-0.5)) * torch.arange(1, 7, dtype=torch.float64).log()
    torch.testing.assert_close(factor, expected)


def test_sharper_temperatures_never_raise_the_entropy():
    q, k = (torch.randn(1, 1, 12, 4, dtype=torch.float64) for _ in range(2))
    values = torch.eye(12, dtype=torch.float64)[None, None]
    last = math.inf
    for factor in (0.0, 0.5, 1.0, 2.0, 5.0):
        t = torch.full((1, 1, 12), factor, dtype=torch.float64)
        weights = attend(q, k, values, score=RowFactor(t))
        entropy = torch.special.entr(weights).sum(-1)
        assert (entropy <= last + 1e-12).all()
        last = entropy


def test_attention_is_not_diluted_by_length():
    module = layer(tokens=())
    largest = {"plain": [], "ours": []}
    for n in (64, 512, 4096):
        q = torch.ones(1, 1, 64, 1, dtype=torch.float64)  # 64 draws of i.i.d. scores
        k = torch.randn(64, 1, n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        factor = module.query_factor(q[..., :1, :], n - 1, n)
        for name, t in (("plain", torch.ones_like(factor)), ("ours", factor)):
            logits = t.unsqueeze(-1) * k.transpose(2, 3)
            largest[name].append(logits.softmax(-1).amax(-1).mean().item())
    assert largest["plain"][2] < 0.1 * largest["plain"][0]  # about 1 / n
    assert min(largest["ours"]) > 0.8 * largest["ours"][0]


def test_the_token_part_stays_within_one_of_the_position_part():
    module, x = layer(), 50 * data()
    q = split_heads(module.q_proj(x), 4)
    position = module.position(torch.arange(1, 11, dtype=torch.float64))
    token = module.query_factor(q, 0, 10) - position
    assert token.abs().max() <= 1 + 1e-12
    assert token.max() > 0.99
    assert token.min() < -0.99


def test_a_value_scaled_to_zero_counts_in_the_denominator_only():
    module, x = layer(dim=4, heads=1, tokens=("v",)), data(dim=4)
    with torch.no_grad():
        module.v_proj.bias.fill_(0)
        module.v_temperature.weight.fill_(0)
        module.v_proj.weight.copy_(torch.eye(4))
    x[:, 3] = torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
    x[:, :3, 0] = x[:, 4:, 0] = 0.0
    with torch.no_grad():
        module.v_temperature.weight[0, 0, 0] = -1e6  # tanh(-big) + 1 = 0 for the token with channel 0 alone
    silent = module(x, Grid(10))
    q, k, v = (split_heads(p(x), 1) for p in (module.q_proj, module.k_proj, module.v_proj))
    v = v.clone()
    v[:, :, 3] = 0
    factor = RowFactor(module.query_factor(q, 0, 10))
    torch.testing.assert_close(
        silent, module.proj(merge_heads(attend(q, k, v, where=Causal(), score=factor)))
    )


@pytest.mark.parametrize("rotary_dims", [0, 2])
def test_decoding_counts_absolute_positions(rotary_dims):
    module, x = layer(kv_heads=2, rotary_dims=rotary_dims), data(9)
    whole = module(x, Grid(9))
    out, past = module.prefill(x[:, :5])
    outs = [out]
    for t in range(5, 9):
        out, past = module.step(x[:, t], past)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert past.k.shape == (2, 2, 9, 4)
    # Counting the rows of one call instead, a decoded token would have factor 1.
    q = split_heads(module.q_proj(x[:, 8:]), 4)
    assert not torch.allclose(module.query_factor(q, 8, 9), module.query_factor(q, 0, 9))


def test_without_causality_every_query_has_the_temperature_of_all_keys():
    module = layer(causal=False, tokens=())
    factor = module.query_factor(torch.zeros(1, 4, 7, 4, dtype=torch.float64), 0, 7)
    assert factor.eq(factor[0, 0, 6]).all()
    assert factor[0, 0, 0] > 1
    with pytest.raises(ArgumentError, match="causal"):
        module.prefill(data())


def test_pairs_are_those_of_plain_attention():
    for n in (64, 128, 256):
        with watch_plans() as plans:
            layer()(data(n), Grid(n))
        assert [plan.pairs_needed for plan in plans] == [2 * 4 * n * (n + 1) // 2]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_heads": 3}, "kv_heads"), ({"tokens": "qv"}, "tokens"), ({"tokens": ("k",)}, "tokens"),
        ({"position": "log"}, "position"), ({"rotary_dims": 3}, "rotary_dims"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        SelectiveSelfAttention(dim=16, heads=4, **options)
