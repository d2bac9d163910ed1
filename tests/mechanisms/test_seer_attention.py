"""SeerAttention: what its equations promise. The gate has its own tests in test_block_gate.py."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.routed.seer_attention import SeerAttention, block_sparse_attention
from foveate.models.backbone import build
from foveate.patterns.basic import Causal
from foveate.routing.blocks import causal_blocks
from foveate.tasks.recall import RecallWorkload
from foveate.tasks.train import Trainer


def layer(dim=16, heads=2, block=4, **options):
    return SeerAttention(dim=dim, heads=heads, block=block, **options).double().eval()


def tokens(n=22, dim=16, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def dense(module, x):
    q, k, v = module._project(x)
    q, k = module._placed(q), module._placed(k)
    out = attend(q, k, v, where=Causal() if module.causal else None, backend="reference")
    return module.proj(merge_heads(out))


@pytest.mark.parametrize("route", ["block", "token"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [{"threshold": 0.0}, {"ratio": 1.0}])
def test_all_blocks_are_full_attention(route, causal, rule):
    module, x = layer(route=route, causal=causal, kv_heads=1, rope=100.0, **rule), tokens()
    torch.testing.assert_close(module(x, Grid(22)), dense(module, x))


@pytest.mark.parametrize("n", [32, 30, 3])
def test_all_ones_are_full_causal_attention(n):
    q, k, v = (torch.randn(2, heads, n, 8) for heads in (4, 2, 2))
    chosen = torch.ones(2, 4, -(-n // 8), -(-n // 8), dtype=torch.bool)
    torch.testing.assert_close(block_sparse_attention(q, k, v, chosen, 8), attend(q, k, v, where=Causal()))
    torch.testing.assert_close(block_sparse_attention(q, k, v, chosen, 8, causal=False), attend(q, k, v))


def test_chosen_blocks_and_no_others_count():
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    chosen = torch.rand(1, 2, 5, 5) < 0.5
    wide = chosen.repeat_interleave(4, 2).repeat_interleave(4, 3) & Causal().dense(20)
    expected = attend(q, k, v, mask=wide, backend="reference")
    torch.testing.assert_close(block_sparse_attention(q, k, v, chosen, 4), expected)
    chosen[:, :, 2] = False
    assert block_sparse_attention(q, k, v, chosen, 4)[:, :, 8:12].eq(0).all()


def test_published_choice_shares_blocks_and_ends_dense():
    module, n = layer(threshold=0.3), 24
    q, k, _ = module._project(tokens(n))
    found = module.select(q, k).dense()
    blocks = found.unflatten(2, (6, 4)).unflatten(4, (6, 4)).any(5).any(3)
    assert blocks.diagonal(dim1=2, dim2=3).all(), "a query does not see itself"
    assert blocks[:, :, 4:].equal(causal_blocks(n, n, 4, 4)[4:].expand(2, 2, 2, 6))
    wide = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3) & Causal().dense(n)
    assert found.equal(wide)
    assert not blocks[:, :, :4].equal(causal_blocks(n, n, 4, 4)[:4].expand(2, 2, 4, 6))


def test_the_published_choice_looks_ahead_inside_its_block_and_the_strict_one_does_not():
    x = tokens(32)
    for route, strict in (("block", False), ("token", True)):
        module, moved = layer(route=route, ratio=0.3), 0.0
        before = module(x, Grid(32))
        for t in range(1, 32):
            changed = x.clone()
            changed[:, t:] = 5 * torch.randn_like(changed[:, t:])
            moved = max(moved, float((module(changed, Grid(32)) - before)[:, :t].detach().abs().max()))
        assert (moved < 1e-12) == strict


@pytest.mark.parametrize("rule", [{"threshold": 0.25}, {"ratio": 0.4}])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "rope": 50.0, "gate_dim": 6}])
def test_decoding_is_the_strict_form_token_by_token(rule, options):
    module, x = layer(dim=32, heads=4, route="token", **rule, **options), tokens(19, 32)
    expected = module(x, Grid(19))
    cache, steps = None, []
    for t in range(19):
        out, cache = module.step(x[:, t], cache)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), expected)
    # from a prompt on
    out, cache = module.prefill(x[:, :13])
    torch.testing.assert_close(out, expected[:, :13])
    for t in range(13, 19):
        out, cache = module.step(x[:, t], cache)
        torch.testing.assert_close(out, expected[:, t])
    assert cache.gate.shape[2] == 4
    assert cache.rest.shape[2] == 3


def test_decoding_reads_few_keys():
    module = layer(dim=32, heads=4, route="token", ratio=0.25)
    x = tokens(65, 32)
    _, cache = module.prefill(x[:, :64])
    real = torch.ones_like(cache.v).requires_grad_()
    out, _ = module.step(x[:, 64], cache._replace(v=cache.v.detach() * real))
    out.square().sum().backward()
    assert real.grad is not None
    seen = real.grad.abs().sum(-1) > 0
    assert seen.sum(-1).eq(4 * 4).all(), "4 of 16 blocks behind are read, with 4 tokens each"


def test_training_is_dense_and_teaches_the_gate_alone():
    module, x = layer(ratio=0.3).train(), tokens(32)
    out = module(x, Grid(32))
    torch.testing.assert_close(out, dense(module, x))
    assert module.loss is not None
    module.loss.backward(retain_graph=True)
    assert all((p.grad is not None) == name.startswith("gate.") for name, p in module.named_parameters())
    by_hand = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    out.square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        if name in by_hand:
            torch.testing.assert_close(p.grad, by_hand[name])
    assert module.eval()(x, Grid(32)).isfinite().all()


@pytest.mark.parametrize("route", ["block", "token"])
def test_pairs_follow_the_ratio_and_the_gate_the_square_of_blocks(route):
    shares = []
    for n in (256, 512, 1024):
        module = SeerAttention(dim=16, heads=2, block=16, ratio=0.25, route=route).eval()
        q, k, v = module._project(torch.randn(1, n, 16))
        found = explain(q, k, v, where=module.select(q, k))
        shares.append(found.pairs_needed / (n * (n + 1)))
        assert module.gate(q, k).shape == (1, 2, n // 16, n // 16)
    # of the triangle: a quarter, and what is given: own blocks, and the last rows
    assert 0.25 < shares[2] < shares[1] < shares[0] < 0.55
    assert shares[2] < 0.36


def test_half_precision_stays_close():
    module, x = layer(dim=32, heads=2, threshold=0.0), tokens(40, 32)
    expected = module(x, Grid(40))
    low = module.to(torch.bfloat16)(x.to(torch.bfloat16), Grid(40))
    assert (low.double() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"gate_dim": 5}, "gate_dim"),
        ({"block": 0}, "block"),
        ({"pooling": "mean"}, "pooling"),
        ({"threshold": 1.0}, "threshold"),
        ({"ratio": 1.5}, "ratio"),
        ({"route": "row"}, "route"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)


def test_decoding_without_causality_is_refused():
    module = layer(causal=False)
    for call in (lambda: module.prefill(tokens()), lambda: module.step(tokens()[:, 0])):
        with pytest.raises(ArgumentError, match="causal"):
            call()


@pytest.mark.slow
def test_recall_is_learned_with_a_quarter_of_the_map():
    workload = RecallWorkload(test_size=128)
    trainer = Trainer(workload, lambda spec, seed: build("seer_attention", spec, seed=seed))
    trainer.advance(300)
    learned = trainer.evaluate().quality
    weights = [average for name, average in trainer.average.items() if ".gate." in name]
    assert weights
    for average in weights:
        torch.nn.init.normal_(average)
    assert learned > 0.85
    assert trainer.evaluate().quality < learned - 0.2
