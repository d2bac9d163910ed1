"""The FLOP counter against the same mathematics written with matrix products, which torch does count."""

import pytest
import torch
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from foveate.kernels.attend import attend
from foveate.kernels.flops import (
    FlopCounter,
    attention_backward_flops,
    attention_flops,
    count_flops,
    formulas,
)
from foveate.kernels.problem import Problem
from foveate.kernels.sample import sample
from foveate.kernels.select import plan
from foveate.patterns.grids import Neighborhood
from foveate.patterns.selection import Selection
from foveate.scores.rules import Sigmoid, Softmax


def _plain(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


@pytest.mark.parametrize(
    ("b", "h", "n_q", "n_k", "d", "d_v"), [(1, 2, 16, 16, 8, 8), (3, 1, 5, 9, 16, 16), (2, 4, 7, 3, 4, 4)]
)
def test_fused_forward_equals_plain_products(b, h, n_q, n_k, d, d_v):
    q, k, v = torch.randn(b, h, n_q, d), torch.randn(b, h, n_k, d), torch.randn(b, h, n_k, d_v)
    plain = count_flops(_plain, q, k, v)
    assert count_flops(scaled_dot_product_attention, q, k, v) == plain
    assert attention_flops(b * h * n_q * n_k, d, d_v) == plain


def test_fused_backward_is_the_plain_one_with_the_logits_again():
    def run(fn):
        q, k, v = (torch.randn(2, 3, 10, 8, requires_grad=True) for _ in range(3))
        with FlopCounter() as forward:
            out = fn(q, k, v)
        return count_flops(out.sum().backward), forward.get_total_flops()

    fused, forward = run(scaled_dot_product_attention)
    plain, plain_forward = run(_plain)
    assert forward == plain_forward
    assert fused == plain + forward // 2
    pairs = 2 * 3 * 10 * 10
    assert fused == attention_backward_flops(pairs, 8, 8)
    assert plain == attention_backward_flops(pairs, 8, 8, recompute=False)


def test_a_mask_does_not_change_the_count():
    q = torch.randn(1, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert count_flops(scaled_dot_product_attention, q, q, q, attn_mask=mask) == attention_flops(72, 8, 8)


@pytest.mark.parametrize("weigh", [Softmax(), Sigmoid()], ids=repr)
@pytest.mark.parametrize("routed", [False, True])
def test_tiles_count_what_explain_says(weigh, routed):
    where = Neighborhood((9, 10), 5)
    if routed:
        ids = torch.randperm(90).view(1, 1, 6, 15).expand(2, 4, -1, -1)
        where = Selection(ids, ids[..., :7], n_q=90, n_k=90)
    q, k, v = (torch.randn(2, 4, 90, 8, requires_grad=True) for _ in range(3))
    told = plan(Problem.of(q, k, v, where=where, weigh=weigh), "tiles")
    with FlopCounter() as counter:
        out = attend(q, k, v, where=where, weigh=weigh, backend="tiles")
    assert counter.get_total_flops() == told.flops
    kept = 0 if weigh.has_lse else told.flops // 2  # plain autograd keeps the weights
    assert count_flops(out.sum().backward) == told.flops_backward - kept


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_sampling_multiplies_every_pixel_it_reads(weighted, axes):
    levels = [torch.randn(2, 3, 8, *sizes[:axes], requires_grad=True) for sizes in ((5, 6, 4), (3, 2, 2))]
    points = torch.rand(2, 3, 7, 2, 4, axes, requires_grad=True)
    weights = torch.rand(2, 3, 7, 2, 4, requires_grad=True) if weighted else None
    reads = 2 * 3 * 7 * 2 * 4 * 2**axes
    for backend in ("bag", "grid_sample"):
        with FlopCounter() as counter:
            out = sample(levels, points, weights, backend=backend)
        assert counter.get_total_flops() == 2 * reads * 8
        assert count_flops(out.sum().backward) == 2 * 2 * reads * 8
        with torch.no_grad():
            assert count_flops(sample, levels, points, weights, backend=backend) == 2 * reads * 8
    # A gradient nobody asks for is not paid for.
    out = sample([x.detach() for x in levels], points, weights, backend="grid_sample")
    assert count_flops(out.sum().backward) == 2 * reads * 8


def test_bags_without_weights_multiply_nothing():
    ids, table = torch.randint(9, (4, 3)), torch.randn(9, 5, requires_grad=True)
    assert count_flops(lambda: embedding_bag(ids, table, mode="sum").sum().backward()) == 0


def test_torch_misses_it_and_stays_unpatched():
    q = torch.randn(1, 2, 6, 8)
    with FlopCounterMode(display=False) as theirs:
        scaled_dot_product_attention(q, q, q)
    # The day torch counts this by itself, our formulas can go.
    assert theirs.get_total_flops() == 0
    assert not set(formulas()) & set(flop_registry)


def test_own_formulas_win():
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q = torch.randn(1, 1, 4, 4)
    with FlopCounter(custom_mapping={op: lambda *a, **k: 7}) as counter:
        scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 7
