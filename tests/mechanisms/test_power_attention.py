"""PowerAttention: every 'works when' statement of its description; the mask's own stand in patterns/test_power.py."""

import math
from itertools import pairwise

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.power_attention import PowerAttention, power_attention


def tensors(n, heads=2, kv_heads=2, d=4):
    torch.manual_seed(0)
    return [torch.randn(1, h, n, d, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("options", [{"block": 40}, {"block": 4, "window": 10}, {"block": 64}])
def test_large_blocks_or_windows_are_full_causal_attention(options):
    q, k, v = tensors(40)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(power_attention(q, k, v, **{"window": 1, **options}), want)


def test_grouped_heads_and_odd_lengths():
    q, k, v = tensors(37, heads=4, kv_heads=2)
    full = power_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), block=4, window=2)
    torch.testing.assert_close(power_attention(q, k, v, block=4, window=2), full)


@pytest.mark.parametrize("distance", [1, 4, 6, 7, 11, 23])
def test_copying_from_a_distance_takes_as_many_layers_as_it_has_ones(distance):
    n, layers = 40, bin(distance).count("1")
    x = torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True)
    y, reached = x, []
    for _ in range(layers):
        y = y + power_attention(y, y, y, block=1, window=1, sinks=0)
        (gradient,) = torch.autograd.grad(y[0, 0, -1].sum(), x, retain_graph=True)
        reached.append(bool(gradient[0, 0, n - 1 - distance].abs().sum() > 0))
    assert reached == [False] * (layers - 1) + [True]


def test_decoding_token_by_token_is_the_same():
    torch.manual_seed(0)
    module = PowerAttention(dim=16, heads=4, kv_heads=2, block=3, window=2).double()
    x = torch.randn(2, 29, 16, dtype=torch.float64)
    whole = module(x, Grid(29))
    start, past = module.prefill(x[:, :11])
    rows = [start]
    for t in range(11, 29):
        row, past = module.step(x[:, t], past)
        rows.append(row[:, None])
    torch.testing.assert_close(torch.cat(rows, 1), whole)


def test_work_grows_as_n_log_n():
    per_query = []
    for n in (16384, 32768, 65536, 131072):
        shape = (1, 1, n, 64)
        e = explain(shape, shape, shape, where=PowerAttention(dim=64, heads=1).where, backend="tiles")
        per_query.append(e.pairs_needed / n)
        assert e.pairs_computed <= e.pairs_needed + n * 128
        assert per_query[-1] <= 256 * (math.log2(n / 256) + 1 + 5 + 1)
    # A doubling adds one block to the queries that are far enough in; while those become more, a little more.
    grown = [b - a for a, b in pairwise(per_query)]
    assert grown == sorted(grown, reverse=True)
    assert 256 <= grown[-1] <= 1.1 * 256


def test_wrong_options_are_named():
    for options, name in (({"kv_heads": 3}, "kv_heads"), ({"block": 0}, "block"), ({"window": 0}, "window")):
        with pytest.raises(ArgumentError, match=name):
            PowerAttention(dim=16, heads=4, **options)
