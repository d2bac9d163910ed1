"""The gate over blocks: its names, its positions, what it learns from and how it chooses."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.mechanisms.block_gate import BlockGate, choose_blocks, gate_loss, poolings_of, true_blocks
from foveate.routing.blocks import causal_blocks, choose_top
from foveate.routing.truth import block_recall, block_weights


def inputs(n=22, heads=4, kv_heads=2, width=8, batch=2):
    q = torch.randn(batch, heads, n, width, dtype=torch.float64)
    return q, torch.randn(batch, kv_heads, n, width, dtype=torch.float64)


def test_names_say_how_blocks_are_pooled_and_in_which_order():
    assert poolings_of("Qavg_Kmaxminavg") == (("avg",), ("max", "min", "avg"))
    assert poolings_of("Qmaxavg_Kavgmin") == (("max", "avg"), ("avg", "min"))
    for name in ("Kavg_Qavg", "Qavg", "Qavgavg_Kmax", "Qmean_Kmax", 3):
        with pytest.raises(ArgumentError, match="pooling"):
            poolings_of(name)  # type: ignore[arg-type]


def test_queries_have_a_map_only_where_they_need_one():
    for options, both in (({}, False), ({"double": True}, True), ({"gate_dim": 6}, True)):
        gate = BlockGate(heads=4, kv_heads=2, width=8, block=4, pooling="Qavg_Kavg", **options)
        assert (gate.q_weight is not None) == both
        assert gate.k_weight.shape[0] == (2 if both else 4)
        assert gate(*(x.float() for x in inputs())).shape == (2, 4, 6, 6)
    assert BlockGate(heads=4, width=8, pooling="Qmaxavg_Kavg").q_weight is not None


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_the_gate_sum_to_one(rows):
    q, k = inputs()
    gate = BlockGate(heads=4, kv_heads=2, width=8, block=4).double()
    allowed = causal_blocks(22, 22, rows, 4)
    shares = gate.probabilities(q, k, allowed, query_block=rows)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    assert shares[(~allowed).expand(shares.shape)].eq(0).all()


def test_blocks_stand_where_they_begin():
    q, k = inputs(n=24)
    gate = BlockGate(heads=4, kv_heads=2, width=8, block=4).double()
    whole, part = gate.keys(k), gate.keys(k[:, :, 8:], start=8)
    torch.testing.assert_close(part, whole[:, :, 2:])
    torch.testing.assert_close(
        gate.queries(q[:, :, 9:10], block=1, start=9), gate.queries(q, block=1)[:, :, 9:10]
    )
    # given cosines and sines do what positions do
    angles = torch.arange(0, 24, 4).double()[:, None] / 10000.0 ** (torch.arange(0, 8, 2).double() / 8)
    turn = tuple(torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    torch.testing.assert_close(gate.keys(k, turn=turn), whole)


def test_truth_is_the_max_pool_with_rows_that_sum_to_one():
    q, k = inputs()
    truth = true_blocks(q, k, 4)
    exact = block_weights(q, k, 4, 4, causal=True)
    torch.testing.assert_close(truth, exact / exact.sum(-1, keepdim=True))
    torch.testing.assert_close(truth.sum(-1), torch.ones_like(truth[..., 0]))
    # queries by themselves, with the blocks behind them to choose from
    allowed = causal_blocks(22, 22, 1, 4, whole=True)
    truth = true_blocks(q, k, 4, query_block=1, allowed=allowed)
    assert truth[:, :, :3].eq(0).all()
    torch.testing.assert_close(truth[:, :, 3:].sum(-1), torch.ones_like(truth[:, :, 3:, 0]))


def test_loss_is_zero_at_the_truth_and_ignores_the_first_quarter():
    truth = true_blocks(*inputs(n=32), 4)
    logits = truth.clamp(min=1e-300).log()
    assert gate_loss(logits, truth).abs() < 1e-12
    elsewhere = logits + torch.randn_like(logits)
    assert gate_loss(elsewhere, truth) > 0.01
    elsewhere[:, :, 2:] = logits[:, :, 2:]
    assert gate_loss(elsewhere, truth).abs() < 1e-12
    exact = torch.nn.functional.kl_div(
        elsewhere[:, :, 2:].log_softmax(-1), truth[:, :, 2:], reduction="none"
    ).mean()
    torch.testing.assert_close(gate_loss(elsewhere, truth), exact)


def test_choices():
    logits, allowed = torch.randn(2, 3, 8, 8), causal_blocks(32, 32, 4, 4)
    masked = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)
    everything = allowed.expand(logits.shape)
    assert choose_blocks(masked, allowed, threshold=0.0).equal(everything)
    assert choose_blocks(masked, allowed, ratio=1.0).equal(everything)
    assert choose_blocks(masked, allowed, ratio=1.0, triangle=False).equal(everything)
    # 1 - (1 - k / 8)^2 of the map are k columns of the triangle
    assert choose_blocks(masked, allowed, ratio=0.75).sum(-1).eq(allowed.sum(-1).clamp(max=4)).all()
    assert choose_blocks(masked, allowed, ratio=0.01).sum(-1).eq(1).all()
    assert choose_blocks(masked, allowed, ratio=0.5, triangle=False).sum(-1)[0, 0].tolist() == [
        1, 1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip
    last = choose_blocks(masked, allowed, threshold=0.9, dense_rows=2)
    assert last[:, :, 6:].equal(everything[:, :, 6:])
    fewer = [choose_blocks(masked, allowed, threshold=t).sum() for t in (0.01, 0.1, 0.3)]
    assert fewer[0] > fewer[1] > fewer[2]
    for options in ({}, {"threshold": 0.1, "ratio": 0.5}):
        with pytest.raises(ArgumentError, match="threshold"):
            choose_blocks(masked, allowed, **options)
    with pytest.raises(ArgumentError, match="ratio"):
        choose_blocks(masked, allowed, ratio=2.0)


def needles(batch, heads, blocks, block, width, turns):
    """Queries and keys in which one token of every block speaks for it, in a code that differs between the two.

    A query block looks for one earlier block: its telling token is that block's, turned by `turns` (H, D, D).
    """
    n = blocks * block
    q, k = (0.3 * torch.randn(batch, heads, n, width) for _ in range(2))
    topic = torch.nn.functional.normalize(torch.randn(batch, heads, blocks, width), dim=-1) * 3 * width**0.5
    sought = (torch.rand(batch, heads, blocks) * torch.arange(blocks)).long()
    place = torch.randint(block, (batch, heads, blocks)) + torch.arange(blocks) * block
    rows = place[..., None].expand(-1, -1, -1, width)
    k.scatter_(2, rows, topic)
    wanted = topic.gather(2, sought[..., None].expand(-1, -1, -1, width))
    q.scatter_(2, rows, wanted)
    return q @ turns, k @ turns


def distil(gate, draw, steps, block):
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(steps):
        q, k = draw()
        allowed = causal_blocks(q.shape[2], k.shape[2], block, block)
        loss = gate_loss(gate(q, k, allowed), true_blocks(q, k, block))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def recalls(gate, q, k, block, top):
    """Recall of true weight by the gate's best blocks, by as many at random, and by the best there are."""
    allowed = causal_blocks(q.shape[2], k.shape[2], block, block)
    truth = true_blocks(q, k, block)
    rows = slice(truth.shape[2] // 2, None)
    with torch.no_grad():
        logits = gate(q, k, allowed)
    choices = logits, torch.randn_like(logits), truth
    return [float(block_recall(truth, choose_top(c, top, allowed))[:, :, rows].mean()) for c in choices]


def test_a_distilled_gate_finds_the_true_blocks():
    heads, blocks, block, width = 2, 12, 8, 8
    turns = torch.linalg.qr(torch.randn(heads, width, width)).Q

    def draw(batch=8):
        return needles(batch, heads, blocks, block, width, turns)

    gate = BlockGate(heads=heads, width=width, gate_dim=16, block=block)
    q, k = draw(32)
    before, chance, _ = recalls(gate, q, k, block, 2)
    distil(gate, draw, 150, block)
    after, _, best = recalls(gate, q, k, block, 2)
    assert before < chance + 0.2
    assert after > chance + 0.5 * (best - chance), (before, after, chance, best)
