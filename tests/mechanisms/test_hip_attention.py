"""HiP attention: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.routed.hip_attention import HiPAttention, hip_attention, hip_selection
from foveate.patterns.basic import Causal

SMALL = {"keys": 8, "block_q": 8, "block_k": 2, "group": 1, "window": 8, "sink": 4}


def draw(n=96, h=2, h_kv=2, d=8, n_q=None, dtype=torch.float64):
    q = torch.randn(2, h, n_q or n, d, dtype=dtype)
    return q, *(torch.randn(2, h_kv, n, d, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("n", "n_q"), [(96, 96), (75, 75), (96, 13), (5, 5)])
def test_keeping_all_keys_is_causal_attention(n, n_q, group):
    q, k, v = draw(n, 4, 2, n_q=n_q)
    out = hip_attention(q, k, v, **{**SMALL, "keys": n + 3, "group": group})
    torch.testing.assert_close(out, attend(q, k, v, where=Causal()))


def test_short_pasts_are_kept_whole():
    q, k, v = draw(64)
    out = hip_attention(q, k, v, **{**SMALL, "keys": 24})
    # The first 32 tokens: 24 keys and a window of 8.
    torch.testing.assert_close(out[:, :, :32], attend(q, k, v, where=Causal())[:, :, :32])
    assert not torch.allclose(out[:, :, 40:], attend(q, k, v, where=Causal())[:, :, 40:])


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_it_is_masked_softmax_over_what_was_kept(group, official):
    q, k, v = draw(90, 4, 2)
    options = {**SMALL, "group": group, "official": official}
    found, where = hip_selection(q, k, **options)
    where.schedule.validate()
    expected = torch.zeros(2, 4, 90, 90, dtype=torch.bool)
    size = SMALL["block_k"] * group
    for j in range(12):
        rows, end = slice(8 * j, 8 * j + 8), 8 * j + 8
        for b in range(2):
            for h in range(4):
                for start in found.starts[b, h, j, : found.count[j]].tolist():
                    expected[b, h, rows, start : start + size] = True
        expected[:, :, rows, : -(-4 // size) * size] = True
        # Where the sequence ends inside a query block its window ends there too; theirs moves on.
        end = end if official else min(end, 90)
        expected[:, :, rows, max(end - 8, 0) : end] = True
    expected &= Causal().dense(90)
    assert where.dense().equal(expected)
    torch.testing.assert_close(hip_attention(q, k, v, **options), attend(q, k, v, mask=expected))


def test_every_query_sees_itself():
    for n in (1, 7, 64, 90):
        q, k, _ = draw(n)
        assert hip_selection(q, k, **SMALL)[1].dense().diagonal(dim1=-2, dim2=-1).all()


def test_without_gaps_between_search_and_window_for_grouped_keys():
    q, k, _ = draw(64)
    options = {**SMALL, "keys": 64, "group": 4}
    assert hip_selection(q, k, **options)[1].dense().equal(Causal().dense(64).expand(2, 2, 64, 64))
    # The authors take the window off in units of keys' groups, so that tokens fall between the two.
    theirs = hip_selection(q, k, official=True, **options)[1].dense()
    assert not theirs.equal(Causal().dense(64).expand(2, 2, 64, 64))


def test_the_choice_gets_no_gradient_but_attention_does():
    q, k, v = (x.requires_grad_() for x in draw(96))
    found, where = hip_selection(q, k, **SMALL)
    assert not found.starts.requires_grad
    out = hip_attention(q, k, v, **SMALL)
    given = torch.autograd.grad(out.square().sum(), (q, k, v))
    fixed = torch.autograd.grad(attend(q, k, v, where=where).square().sum(), (q, k, v))
    for a, b in zip(given, fixed, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("at", [50, 700, 1500])
def test_a_planted_needle_is_found(at):
    n = 2048
    q, k, v = draw(n, 1, 1, 16, dtype=torch.float32)
    near = torch.exp(-(((torch.arange(n) - at) / 150.0) ** 2))
    k = k * 0.1 + near[:, None] * q[:, :, -1:] * 3
    v[:, :, at] = 100.0
    out = hip_attention(q[:, :, -1:], k, v, keys=32, block_q=1, block_k=1, group=1, window=32, sink=4)
    assert (
        hip_selection(q[:, :, -1:], k, keys=32, block_q=1, block_k=1, group=1, window=32)[1]
        .dense()[..., at]
        .all()
    )
    assert (out > 2).all()


@pytest.mark.parametrize("group", [1, 2])
def test_prefill_and_steps_equal_the_forward_pass(group):
    module = HiPAttention(
        dim=16, heads=4, kv_heads=2, keys=8, block_q=1, block_k=1, group=group, window=4, sink=2
    ).double()
    x = torch.randn(2, 48, 16, dtype=torch.float64)
    whole = module(x, Grid(48))
    out, past = module.prefill(x[:, :40])
    torch.testing.assert_close(out, whole[:, :40])
    out, past = module.prefill(x[:, 40:43], past)
    torch.testing.assert_close(out, whole[:, 40:43])
    for t in range(43, 48):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])


def test_values_never_leak_and_choices_only_inside_a_query_block():
    q, k, v = draw(64)
    before = hip_attention(q, k, v, **SMALL)
    t = 43
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    for x in (q2, k2, v2):
        x[:, :, t:] += 2.0
    after = hip_attention(q2, k2, v2, **SMALL)
    torch.testing.assert_close(after[:, :, :40], before[:, :, :40])
    # Given the choice, rows before t do not change.
    where = hip_selection(q, k, **SMALL)[1]
    a, b = (attend(*x, where=where) for x in ((q, k, v), (q2, k2, v2)))
    torch.testing.assert_close(a[:, :, :t], b[:, :, :t])


def test_attention_is_linear_in_tokens():
    computed = []
    for n in (256, 512, 1024):
        q, k, v = draw(n, dtype=torch.float32)
        where = hip_selection(q, k, **SMALL)[1]
        e = explain(q, k, v, where=where, backend="tiles")
        assert e.pairs_needed <= 4 * n * (8 + 8 + 4)
        computed.append(e.pairs_computed)
    assert computed == [4 * n * (8 + 8 + 4) for n in (256, 512, 1024)]


def test_low_precision_stays_near():
    q, k, v = (x.bfloat16() for x in draw(96, dtype=torch.float32))
    where = hip_selection(q, k, **SMALL)[1]
    exact = attend(q.double(), k.double(), v.double(), where=where)
    assert (hip_attention(q, k, v, **SMALL).double() - exact).abs().max() < 0.03


def test_bad_arguments_are_named():
    q, k, v = draw(32)
    with pytest.raises(ArgumentError, match=r"^window:.*own key"):
        hip_attention(q, k, v, block_q=32, window=16)
    with pytest.raises(ArgumentError, match=r"^sink:"):
        hip_attention(q, k, v, sink=-1)
    with pytest.raises(ArgumentError, match=r"^k:"):
        hip_attention(torch.cat([q, q[:, :1]], 1), k, v, **SMALL)
    with pytest.raises(ArgumentError, match=r"^kv_heads:"):
        HiPAttention(dim=16, heads=4, kv_heads=3)
    with pytest.raises(ArgumentError, match=r"^heads:"):
        HiPAttention(dim=12, heads=4)
