"""Reversed attention: what senders' distributions, gates and trees promise."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.select import watch_plans
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.scored.dependency_vit import (
    DependencyBlock,
    DependencyTrunk,
    ReversedAttention,
    chain,
    edges,
    prune,
)


def layer(dim=12, heads=3, **options) -> ReversedAttention:
    torch.manual_seed(0)
    return ReversedAttention(dim=dim, heads=heads, **options).double()


def tokens(n=7, dim=12, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def forward_weights(module, x):
    q, k, v = module.qkv(x)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), v


def test_equals_the_transposed_weights_written_out():
    module, x = layer(), tokens()
    weights, v = forward_weights(module, x)
    share = (module.selector(x) / 0.1).softmax(-1).permute(0, 2, 1)
    m = module.message(x)[..., 0].sigmoid()
    reversed_ = weights.mT * share[:, :, None] * m[:, None, None]
    out, messages = module.send(x)
    torch.testing.assert_close(out, module.proj(merge_heads(reversed_ @ v)))
    torch.testing.assert_close(messages, m)
    torch.testing.assert_close(module.dependencies(x), reversed_.sum(1))


def test_symmetric_weights_and_open_gates_are_ordinary_attention():
    module = layer(dim=8, heads=1)
    with torch.no_grad():
        # q = k on a circle: what is received sums to one as what is sent does, A is doubly stochastic.
        module.qkv.weight[:8] = module.qkv.weight[8:16] = torch.eye(8)
    turn = torch.arange(9, dtype=torch.float64) * 2 * math.pi / 9
    x = torch.zeros(1, 9, 8, dtype=torch.float64)
    x[0, :, 0], x[0, :, 1] = turn.cos() * 3, turn.sin() * 3
    weights, v = forward_weights(module, x)
    torch.testing.assert_close(weights, weights.mT)
    q, k, _ = module.qkv(x)
    torch.testing.assert_close(module._reverse(q, k, v), attend(q, k, v))


def test_what_a_token_sends_is_bounded_by_its_gate():
    module, x = layer(), tokens()
    strength, m = module.gates(x)
    q, k, _ = module.qkv(x)
    per_head = module._reverse(q, k, torch.diag_embed(strength))
    torch.testing.assert_close(per_head.sum(2), strength)  # columns: everything that leaves a sender
    torch.testing.assert_close(module.dependencies(x).sum(1), m)
    assert (strength <= 1).all()
    assert (m < 1).all()


def test_messages_never_grow_with_depth():
    torch.manual_seed(0)
    trunk = DependencyTrunk(dim=12, heads=3, depth=4).double()
    x, messages, before = tokens(), None, torch.ones(2, 7, dtype=torch.float64)
    for block in trunk.blocks:
        x, messages = block(x, messages)
        assert (messages <= before).all()
        before = messages


def test_a_silent_token_leaves_no_trace_in_what_others_receive():
    module, x = layer(), tokens()
    before = torch.ones(2, 7, dtype=torch.float64)
    before[:, 3] = 0
    out, after = module.send(x, before)
    assert after[:, 3].eq(0).all()
    assert module.dependencies(x, before)[:, :, 3].eq(0).all()
    # The same sums over the other senders alone.
    weights, v = forward_weights(module, x)
    strength, _ = module.gates(x, before)
    others = [0, 1, 2, 4, 5, 6]
    mixed = weights[:, :, others].mT @ (v * strength[..., None])[:, :, others]
    torch.testing.assert_close(out, module.proj(merge_heads(mixed)))


def test_pruning_tokens_nobody_sends_to_and_that_send_nothing_is_lossless():
    module, x = layer(dim=8, heads=1), tokens(6, 8, 1)
    with torch.no_grad():
        module.qkv.weight[:16] = 0
        module.qkv.weight[0, 0] = module.qkv.weight[8, 1] = 1.0  # q reads channel 0, k reads channel 1
    x[..., 0], x[..., 1] = 30.0, 30.0
    x[0, 2, 1] = -30.0  # no parent of anybody
    messages = torch.ones(1, 6, dtype=torch.float64)
    messages[0, 2] = 0.0
    whole, _ = module.send(x, messages)
    less, m, ids = prune(x, messages, 5)
    assert ids.tolist() == [[0, 1, 3, 4, 5]]
    torch.testing.assert_close(module.send(less, m)[0], whole[:, ids[0]])


def test_with_hard_parents_a_token_receives_the_sum_of_its_children():
    module = layer(dim=8, heads=1)
    parent = torch.tensor([2, 2, 4, 4, 4, 0, 2, 1])
    x = torch.eye(8, dtype=torch.float64)[None]
    with torch.no_grad():
        module.qkv.weight[:8] = 400 * torch.eye(8, dtype=torch.float64)[parent].T  # q of i asks for parent(i)
        module.qkv.weight[8:16] = torch.eye(8)
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
        module.message[2].weight.zero_()  # m = 1/2 everywhere
    _, v = forward_weights(module, x)
    out, m = module.send(x)
    for j in range(8):
        torch.testing.assert_close(out[0, j], 0.5 * v[0, 0, parent == j].sum(0), atol=1e-9, rtol=0)
    assert m.eq(0.5).all()
    assert module.dependencies(x).argmax(1)[0].tolist() == parent.tolist()


def test_a_cold_selector_sends_with_one_head():
    share, _ = layer(temperature=1e-4).gates(tokens())
    torch.testing.assert_close(share.amax(1), share.sum(1))
    with pytest.raises(ArgumentError, match="temperature"):
        layer(temperature=0.0)


def test_it_knows_no_positions():
    module, x = layer(), tokens()
    order = torch.randperm(7)
    torch.testing.assert_close(module(x[:, order], Grid(7)), module(x, Grid(7))[:, order])


@pytest.mark.parametrize("n", [8, 16, 32])
def test_two_passes_over_all_pairs(n):
    with watch_plans() as plans:
        layer()(tokens(n), Grid(n))
    assert [p.pairs_computed for p in plans] == [2 * 3 * n * n] * 2
    assert [p.d_v for p in plans] == [1, 4]


def test_trunk_prunes_as_it_says_and_keeps_the_loudest():
    torch.manual_seed(0)
    trunk = DependencyTrunk(dim=12, heads=3, depth=4, prune=0.2, prune_after=(1, 3)).double()
    assert trunk.kept(100) == [100, 80, 80, 60, 60]
    x = tokens(10)
    kept = trunk(x)
    assert kept.tokens.shape == (2, 6, 12)
    assert kept.ids.shape == kept.messages.shape == (2, 6)
    assert (kept.ids[:, 1:] > kept.ids[:, :-1]).all()
    _, first = trunk.blocks[0](x)
    dropped = [i for i in range(10) if i in first[0].argsort()[:2].tolist()]
    assert not set(dropped) & set(kept.ids[0].tolist())
    with pytest.raises(ArgumentError, match="prune"):
        DependencyTrunk(dim=12, heads=3, depth=4, prune=0.3)
    with pytest.raises(ArgumentError, match="keep"):
        prune(x, first, 11)


def test_lite_keeps_a_third_of_the_tokens():
    trunk = DependencyTrunk(dim=12, heads=3, depth=12, prune=0.16)
    counts = trunk.kept(196)
    assert counts[0] == counts[1] == 196
    assert counts[2] == counts[4] == 164  # blocks 3 to 5
    assert 0.34 < counts[-1] / 196 <= 0.36


def test_tokens_that_met_stay_together():
    parents = torch.randint(0, 30, (6, 2, 30))
    levels = chain(parents)
    assert levels.shape == (7, 2, 30)
    assert levels[0, 0].tolist() == list(range(30))
    for a, b in pairwise(levels):
        for sample in range(2):
            coarse: dict[int, int] = {}
            for place, after in zip(a[sample].tolist(), b[sample].tolist(), strict=True):
                assert coarse.setdefault(place, after) == after
            assert len(set(coarse.values())) <= len(coarse)


def test_edges_are_a_forest():
    levels = chain(torch.randint(0, 12, (5, 1, 12)))[:, 0]
    found = edges(levels)
    children = [(level, child) for level, child, _ in found.tolist()]
    assert len(set(children)) == len(children)  # one parent each
    assert len(children) == sum(len(set(level.tolist())) for level in levels[:-1])
    hand = chain(torch.tensor([[[1, 1, 1, 3]], [[0, 3, 2, 3]]]))[:, 0]
    assert hand.tolist() == [[0, 1, 2, 3], [1, 1, 1, 3], [3, 3, 3, 3]]
    assert edges(hand).tolist() == [[0, 0, 1], [0, 1, 1], [0, 2, 1], [0, 3, 3], [1, 1, 3], [1, 3, 3]]


def test_parents_of_a_trunk():
    torch.manual_seed(0)
    trunk = DependencyTrunk(dim=12, heads=3, depth=3).double()
    x = tokens(9)
    parents = trunk.parents(x)
    assert parents.shape == (3, 2, 9)
    block = trunk.blocks[0]
    assert torch.equal(parents[0], block.attn.dependencies(block.norm1(x)).argmax(1))


def test_block_scales_its_branches():
    x = tokens()
    out, messages = DependencyBlock(dim=12, heads=3, layer_scale=0.0).double()(x)
    assert torch.equal(out, x)
    assert messages.shape == (2, 7)
    plain = DependencyBlock(dim=12, heads=3, layer_scale=None)
    assert isinstance(plain.mlp, nn.Sequential)
    assert plain.scale1 is None


def test_no_causal_form():
    with pytest.raises(ArgumentError, match="causal"):
        ReversedAttention.for_workload(dim=8, grid=Grid(8), heads=2, causal=True)
