"""AnchorAttention: what its equations promise. The search has its own tests in tests/routing/test_stripes.py."""

import math

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.routed.anchor_attention import AnchorAttention, anchor_attention, select_keys
from foveate.patterns.basic import Causal, Sinks
from foveate.patterns.grids import Windows
from foveate.routing.stripes import StripeRouter


def qkv(n=29, heads=2, kv_heads=2, d=8, dtype=torch.float64):
    return tuple(torch.randn(2, h, n, d, dtype=dtype) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("n", [29, 24, 5, 1])
def test_without_a_limit_it_is_full_causal_attention(kv_heads, each, n):
    q, k, v = qkv(n, kv_heads=kv_heads)
    out = anchor_attention(q, k, v, StripeRouter(block=2, step=3, theta=math.inf, each=each))
    torch.testing.assert_close(out, attend(q, k, v, where=Causal()))


def test_the_released_bounds_miss_a_block_and_count_others_twice():
    q, k, v = qkv(24)
    r = StripeRouter(block=2, step=3, theta=math.inf, official=True)
    out = anchor_attention(q, k, v, r)
    assert not torch.allclose(out, attend(q, k, v, where=Causal()))
    # Key j for a query of run g: once where both passes have one part of it, twice in [b, G) from run 2 on.
    i, j = torch.arange(24)[:, None], torch.arange(24)
    run = i // 6
    times = ((j < 6) | (j // 6 == run)).double() + ((j >= 2) & (j < run * 6 - 2))
    times = times * (j <= i)
    assert times[13, 2:6].eq(2).all()
    assert times[13, 10:12].eq(0).all()
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * times
    torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True) @ v)
    # The first run is plain causal attention in either.
    torch.testing.assert_close(out[:, :, :6], attend(q, k, v, where=Causal())[:, :, :6])


def test_when_nothing_is_near_enough_it_is_first_and_local_keys():
    q, k, v = qkv(31)
    out = anchor_attention(q, k, v, StripeRouter(block=2, step=3, theta=-math.inf))
    streaming = (Sinks(2) | Windows((31,), 6)) & Causal()
    torch.testing.assert_close(out, attend(q, k, v, where=streaming))


def test_three_passes_are_one_softmax_over_what_they_see():
    q, k, v = qkv(40)
    r = StripeRouter(block=2, step=3, theta=0.7)
    near, far = select_keys(q, k, r)
    seen = near.dense() | far.dense()
    assert 0 < far.dense().sum() < (Causal().dense(40) & ~near.dense()).sum() * 4
    torch.testing.assert_close(anchor_attention(q, k, v, r), attend(q, k, v, mask=seen, backend="reference"))


def test_gradients_are_those_of_attention_over_the_seen_keys():
    q, k, v = (x.requires_grad_() for x in qkv(22))
    r = StripeRouter(block=2, step=2, theta=0.5)
    near, far = select_keys(q, k, r)
    plain = attend(q, k, v, mask=near.dense() | far.dense(), backend="reference")
    seed = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (q, k, v), seed)
    for got, want in zip(
        torch.autograd.grad(anchor_attention(q, k, v, r), (q, k, v), seed), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_the_published_choice_looks_ahead_inside_its_run_and_the_strict_one_does_not():
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    for route, strict in (("block", False), ("token", True)):
        module = AnchorAttention(dim=16, heads=2, block=2, step=4, theta=0.5, route=route).double()
        before, moved = module(x, Grid(40)), 0.0
        for t in range(1, 40):
            changed = x.clone()
            changed[:, t:] = 5 * torch.randn_like(changed[:, t:])
            moved = max(moved, float((module(changed, Grid(40)) - before)[:, :t].detach().abs().max()))
        assert (moved < 1e-12) == strict


def test_a_needle_far_back_is_found():
    q, k, _ = qkv(64, dtype=torch.float32)
    q, k = 0.1 * q, 0.1 * k
    k[:, :, 21] = q[:, :, 63] = 4.0
    for each in (False, True):
        near, far = select_keys(q, k, StripeRouter(block=4, step=2, theta=1.0, each=each))
        assert not near.dense()[0, 0, 63, 21]
        assert far.dense()[:, :, 63, 21].all()


def test_pairs_follow_init_run_and_stripes():
    shares = []
    for n in (256, 512, 1024):
        q, k, v = qkv(n, dtype=torch.float32)
        k[:, :, ::32] *= 6
        near, far = select_keys(q, k, StripeRouter(block=16, step=2, theta=1.0))
        close, found = (explain(q, k, v, where=w, backend="tiles") for w in (near, far))
        assert close.pairs_needed <= 4 * n * (16 + 32)
        shares.append((close.pairs_computed / 4 / n, found.pairs_needed / 4 / n**2))
    # What is near stays the same for a query, what is found grows with all there is, and is a small part.
    assert max(s[0] for s in shares) < 1.2 * min(s[0] for s in shares)
    assert all(0.0 < s[1] < 0.25 for s in shares)


def test_half_precision_stays_close():
    q, k, v = qkv(60)
    r = StripeRouter(block=4, step=2, theta=math.inf)
    low = anchor_attention(*(x.to(torch.bfloat16) for x in (q, k, v)), r)
    assert low.dtype == torch.bfloat16
    assert (low.double() - anchor_attention(q, k, v, r)).abs().max() < 0.03


def test_decoding_is_refused_with_the_reason():
    q, k, v = qkv(16)
    with pytest.raises(ArgumentError, match="whole prompts"):
        anchor_attention(q[:, :, -1:], k, v)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block": 0}, "block"),
        ({"step": 0}, "step"),
        ({"route": "row"}, "route"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        AnchorAttention(dim=16, heads=2, **options)
