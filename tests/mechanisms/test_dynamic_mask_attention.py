"""Dynamic mask attention: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.past import Past
from foveate.mechanisms.routed.dynamic_mask_attention import (
    DynamicMaskAttention,
    DynamicPast,
    dynamic_mask_attention,
    select_kept,
)
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.scores.bias import KeyBias


def draw(n=24, h=4, h_kv=2, d=8, n_q=None, dtype=torch.float64):
    q = torch.randn(2, h, n_q or n, d, dtype=dtype)
    k, v = (torch.randn(2, h_kv, n, d, dtype=dtype) for _ in range(2))
    return q, k, v, torch.randn(2, h_kv, n, dtype=dtype)


def with_bias(q, k, v, bias, where):
    return attend(q, k, v, where=where, score=KeyBias(bias.repeat_interleave(q.shape[1] // k.shape[1], 1)))


@pytest.mark.parametrize(("n", "h", "h_kv"), [(24, 4, 2), (13, 3, 1), (1, 2, 2)])
def test_with_all_keys_it_is_causal_attention_with_a_bias(n, h, h_kv):
    q, k, v, bias = draw(n, h, h_kv)
    out = dynamic_mask_attention(q, k, v, bias, window=n)
    torch.testing.assert_close(out, with_bias(q, k, v, bias, Causal()))


@pytest.mark.parametrize(("exponential", "constant"), [(True, 1.0), (False, 0.0)])
def test_at_the_start_the_bias_is_constant(exponential, constant):
    module = DynamicMaskAttention(dim=16, heads=2, window=40, exponential=exponential).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    v = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    assert module.key_bias(v).eq(constant).all()
    q, past = module._project(x, None)
    plain = attend(q, past.k, past.v, where=Causal())
    torch.testing.assert_close(module(x, Grid(20)), module.proj(plain.transpose(1, 2).flatten(2)))
    # Fewer keys than tokens: as no key is worth more than another, the latest are kept.
    module.window = 6
    near = attend(q, past.k, past.v, where=SlidingWindow(5, 0))
    torch.testing.assert_close(module(x, Grid(20)), module.proj(near.transpose(1, 2).flatten(2)))


def test_a_query_keeps_as_many_keys_as_it_can_up_to_the_window():
    bias = torch.randn(2, 2, 30)
    where, _ = select_kept(bias, 30, window=7)
    kept = where.dense().sum(-1)
    assert kept.eq((torch.arange(30) + 1).clamp(max=7)).all()
    best = bias[..., :20].topk(7).indices.sort().values
    assert where.dense()[:, :, 19].nonzero()[:, 2].view(2, 2, 7).equal(best)


def test_heads_of_a_group_share_their_keys():
    q, k, v, bias = draw(20, 4, 2)
    where = select_kept(bias, 20, window=5)[0].dense()
    mask = where.repeat_interleave(2, 1)
    expected = attend(q, k, v, mask=mask, score=KeyBias(bias.repeat_interleave(2, 1)))
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias, window=5), expected)


def test_dropped_keys_have_no_gradient():
    q, k, v, bias = draw(40, 2, 2)
    bias.requires_grad_()
    dynamic_mask_attention(q, k, v, bias, window=4).square().sum().backward()
    kept = select_kept(bias, 40, window=4)[0].dense()
    ever = kept.any(2)
    assert (~ever).any()
    assert bias.grad is not None
    assert bias.grad[~ever].eq(0).all()
    # A key that only one query keeps, alone with others, has a share in its softmax.
    assert bias.grad[ever & (kept.sum(2) > 1)].ne(0).all()


@pytest.mark.parametrize("keep", ["topk", "relu"])
@pytest.mark.parametrize("smooth", [1, 3])
@pytest.mark.parametrize("n_q", [21, 4])
def test_a_bias_per_key_and_the_same_bias_per_pair_agree(keep, smooth, n_q):
    q, k, v, bias = draw(21, n_q=n_q)
    present = torch.rand(2, 21) < 0.8
    options = {"window": 5, "keep": keep, "smooth": smooth, "present": present}
    by_key = dynamic_mask_attention(q, k, v, bias, **options)
    pairs = bias[:, :, None].expand(-1, -1, n_q, -1)
    torch.testing.assert_close(by_key, dynamic_mask_attention(q, k, v, pairs, **options))
    if keep == "relu" and smooth == 1:
        positive = (bias > 0) & present[:, None]
        mask = positive[:, :, None].repeat_interleave(2, 1) & Causal().dense(n_q, 21)
        torch.testing.assert_close(
            by_key, attend(q, k, v, mask=mask, score=KeyBias(bias.repeat_interleave(2, 1)))
        )


def test_without_causality_all_queries_keep_the_same_keys():
    q, k, v, bias = draw(18)
    kept = torch.zeros(2, 2, 18, dtype=torch.bool).scatter_(-1, bias.topk(5).indices, True)
    expected = attend(
        q, k, v, mask=kept.repeat_interleave(2, 1)[:, :, None], score=KeyBias(bias.repeat_interleave(2, 1))
    )
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias, window=5, causal=False), expected)


def test_queries_that_keep_nothing_get_zero():
    q, k, v, bias = draw(10)
    present = torch.ones(2, 10, dtype=torch.bool)
    present[:, :3] = False
    out = dynamic_mask_attention(q, k, v, bias, window=4, present=present)
    assert out[:, :, :3].eq(0).all()
    assert out[:, :, 3:].ne(0).all()
    assert dynamic_mask_attention(q, k, v, -bias.abs(), keep="relu").eq(0).all()


@pytest.mark.parametrize(("keep", "smooth"), [("topk", 1), ("topk", 2), ("relu", 1)])
def test_prefill_and_steps_equal_the_forward_pass(keep, smooth):
    module = DynamicMaskAttention(
        dim=16, heads=4, kv_heads=2, window=6, keep=keep, smooth=smooth, exponential=False
    )
    with torch.no_grad():
        module.double().A.normal_()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    whole = module(x, Grid(30))
    out, past = module.prefill(x[:, :20])
    torch.testing.assert_close(out, whole[:, :20])
    out, past = module.prefill(x[:, 20:23], past)
    torch.testing.assert_close(out, whole[:, 20:23])
    for t in range(23, 30):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])
    assert past.k.shape == (2, 2, 30, 4)


def test_a_needle_that_is_worth_it_is_kept_for_ever():
    n, at = 4096, 37
    q, k, v, bias = draw(n, 1, 1, dtype=torch.float32)
    k[:, :, at], bias[:, :, at] = 3 * q[:, :, -1], 50.0
    out = dynamic_mask_attention(q[:, :, -1:], k, v, bias, window=16)
    torch.testing.assert_close(out[:, :, 0], v[:, :, at], rtol=1e-3, atol=1e-3)


def test_work_is_linear_in_tokens_and_window():
    needed = [select_kept(torch.randn(1, 1, n), n, window=32)[0].schedule for n in (256, 512, 1024)]
    for schedule, n in zip(needed, (256, 512, 1024), strict=True):
        assert schedule.pairs_needed == 32 * n - 32 * 31 // 2
        assert schedule.pairs_computed <= 2 * 32 * n


def test_maps_are_the_weights_of_the_forward_pass():
    module = DynamicMaskAttention(dim=16, heads=2, window=4).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    maps = module.maps(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 12, dtype=torch.float64))
    v = module._project(x, None)[1].v
    torch.testing.assert_close(module(x, Grid(12)), module.proj((maps @ v).transpose(1, 2).flatten(2)))


def test_low_precision_stays_near():
    q, k, v, bias = draw(48, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v, bias)]
    exact = dynamic_mask_attention(*(x.double() for x in half), window=8)
    error = (dynamic_mask_attention(*half, window=8).double() - exact).abs().max()
    assert error < 0.02


def test_bad_arguments_are_named():
    q, k, v, bias = draw(12)
    with pytest.raises(ArgumentError, match=r"^bias:"):
        dynamic_mask_attention(q, k, v, bias[:, :1])
    with pytest.raises(ArgumentError, match=r"^keep:"):
        dynamic_mask_attention(q, k, v, bias, keep="best")
    with pytest.raises(ArgumentError, match=r"^window:"):
        dynamic_mask_attention(q, k, v, bias, window=0)
    with pytest.raises(ArgumentError, match=r"^q:"):
        dynamic_mask_attention(torch.cat([q, q], 2), k, v, bias)
    with pytest.raises(ArgumentError, match=r"^kv_heads:"):
        DynamicMaskAttention(dim=16, heads=4, kv_heads=3)
    with pytest.raises(ArgumentError, match=r"^width:"):
        DynamicMaskAttention(dim=12, heads=4)
    module = DynamicMaskAttention(dim=16, heads=4)
    with pytest.raises(ArgumentError, match=r"^past:"):
        module.step(torch.randn(2, 16), Past(k, v))
    with pytest.raises(ArgumentError, match=r"^past:"):
        module.step(torch.randn(2, 16), DynamicPast(k, v, bias))
