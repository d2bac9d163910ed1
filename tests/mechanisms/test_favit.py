"""Factorised self-attention: every 'works when' statement of its description, as a test."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.favit import FactorizedAttention, on_map
from foveate.mechanisms.projections import merge_heads, split_heads


def attention(**options):
    torch.manual_seed(0)
    made = FactorizedAttention(**{"dim": 32, "heads": 2, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made


def tokens(grid, batch=2, dim=32):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def attended(q, k, v):
    return merge_heads((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def groups(module, x, grid):
    """Queries, keys and values of every group."""
    wide = module.parts[0]
    q = module.q(x)
    yield split_heads(q[..., :wide], 1), *module._pooled(x[..., :wide], grid)
    y, queries, start = on_map(module.mix, x[..., wide:], grid), split_heads(q[..., wide:], module.heads), 0
    for group in module.groups:
        stop = start + group.dim
        mine = queries[..., start // module.heads : stop // module.heads]
        yield mine, *group(y[..., start:stop], grid)
        start = stop


@pytest.mark.parametrize(("reduction", "sizes"), [(1, (7, 9)), (2, (14, 16)), (2, (15, 13)), (4, (28, 14))])
def test_is_softmax_attention_to_each_groups_keys(reduction, sizes):
    ours, grid = attention(reduction=reduction), Grid(*sizes)
    x = tokens(grid)
    parts = list(groups(ours, x, grid))
    pooled = (sizes[0] // reduction) * (sizes[1] // reduction)
    assert [k.shape[2] for _, k, _ in parts] == [pooled, *[49] * len(ours.groups)]
    assert [k.shape[1] for _, k, _ in parts] == [1, *[2] * len(ours.groups)]
    expected = ours.proj(torch.cat([attended(*part) for part in parts], dim=-1))
    torch.testing.assert_close(ours(x, grid), expected)


def test_without_reduction_the_global_group_is_full_attention_of_its_channels():
    ours, grid = attention(), Grid(5, 8)
    with torch.no_grad():
        ours.reduce.weight.copy_(torch.eye(4)[..., None, None])
        for p in (ours.reduce.bias, ours.local.weight, ours.local.bias):
            p.zero_()
    x = tokens(grid)
    k, v = ours._pooled(x[..., :4], grid)
    normed = functional.layer_norm(x[..., :4], (4,), ours.norm.weight, ours.norm.bias)
    torch.testing.assert_close(torch.cat([k, v], -1)[:, 0], ours.kv(normed))


@pytest.mark.parametrize("official", [False, True])
def test_on_one_window_the_local_group_sees_its_very_pixels(official):
    group, grid = attention(official=official).groups[0], Grid(7, 7)
    y = tokens(grid, dim=28)
    torch.testing.assert_close(group.gather(y, grid), split_heads(y, 2))


def window_means(y, grid, dilation, official):
    """The authors' steps: reflect, unfold, average."""
    span = 6 * dilation + 1
    below, right = (-n % span for n in grid)
    padded = functional.pad(y.transpose(1, 2).unflatten(2, grid.sizes), (0, right, 0, below), mode="reflect")
    boxes = functional.unfold(padded, 7, dilation=dilation, stride=span)
    boxes = boxes.reshape(len(y), 2, -1, 49, boxes.shape[-1]).permute(0, 1, 3, 4, 2)
    if not official:
        return boxes.mean(3)
    return functional.adaptive_avg_pool2d(boxes.flatten(3), (None, boxes.shape[-1]))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("sizes", [(14, 16), (15, 13), (28, 7)])
def test_windows_are_reflected_and_averaged(sizes, official):
    ours, grid = attention(reduction=2, official=official), Grid(*sizes)
    y = tokens(grid, dim=14)
    for group, dilation in zip(ours.groups, (1, 2), strict=True):
        torch.testing.assert_close(group.gather(y, grid), window_means(y, grid, dilation, official))


def test_the_authors_average_mixes_channels_and_ours_does_not():
    grid = Grid(14, 14)
    y = torch.zeros(1, grid.numel, 28, dtype=torch.float64)
    y[..., 3] = 1.0
    ours = attention().groups[0].gather(y, grid)
    theirs = attention(official=True).groups[0].gather(y, grid)
    assert ours[0, 0].any(0).nonzero().flatten().tolist() == [3]
    assert ours.max() == 1
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("reduction", [1, 2])
def test_weights_of_every_query_sum_to_one(reduction):
    ours, grid = attention(reduction=reduction), Grid(14, 14)
    with torch.no_grad():
        for part in (ours, *ours.groups):
            width = part.kv.out_features // 2
            part.kv.weight[width:] = 0
            part.kv.bias[width:] = 1
            part.local.weight.zero_()
            part.local.bias.zero_()
    ones = torch.ones(1, 196, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens(grid, 1), grid), ours.proj(ones))


@pytest.mark.parametrize("side", [14, 28, 56])
def test_local_pairs_are_linear_and_global_ones_divided_by_the_reduction(side):
    n, ours, grid = side * side, attention(reduction=2), Grid(side, side)
    pairs = []
    with torch.no_grad():
        for q, k, v in groups(ours, tokens(grid, 1), grid):
            pairs.append(explain(tuple(q.shape), tuple(k.shape), tuple(v.shape)).pairs_needed)
    assert pairs == [n * n // 4, 2 * n * 49, 2 * n * 49]


@pytest.mark.parametrize("official", [False, True])
def test_gradients_reach_every_parameter_with_three_groups(official):
    ours, grid = attention(reduction=2, official=official), Grid(7, 8)
    ours(tokens(grid, 1), grid).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())


def test_small_maps_are_refused_by_what_can_be_reflected():
    assert attention()(tokens(Grid(4, 9)), Grid(4, 9)).isfinite().all()
    with pytest.raises(ArgumentError, match=r"^grid: .*more than 4 positions on axis 0"):
        attention()(tokens(Grid(3, 9)), Grid(3, 9))
    # The dilated windows of the second group span 13 tokens.
    assert attention(reduction=2)(tokens(Grid(7, 9)), Grid(7, 9)).isfinite().all()
    with pytest.raises(ArgumentError, match=r"^grid: .*more than 7 positions on axis 1"):
        attention(reduction=2)(tokens(Grid(9, 6)), Grid(9, 6))
    with pytest.raises(ArgumentError, match=r"^grid: .*reduction=8"):
        attention(reduction=8)(tokens(Grid(30, 4)), Grid(30, 4))


def test_channels_are_never_lost():
    for options, message in (
        ({"dim": 20}, r"^dim: .*multiple of 8"),
        ({"dim": 24, "reduction": 2}, r"^dim: .*multiple of 16.*2 : 7 : 7"),
        ({"dim": 16, "heads": 2, "reduction": 2}, r"^heads: .*7 channels"),
        ({"reduction": 0}, r"^reduction"),
        ({"window": 0}, r"^window"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attention(**options)


def test_reductions_for_workloads():
    def chosen(dim, heads, side):
        return FactorizedAttention.for_workload(dim=dim, grid=Grid(side, side), heads=heads).reduction

    assert [chosen(64, 4, side) for side in (7, 14, 28, 48, 56)] == [1, 2, 4, 4, 8]
    assert chosen(40, 5, 28) == 1
    with pytest.raises(ArgumentError, match=r"causal.*Not causal"):
        FactorizedAttention.for_workload(dim=64, grid=Grid(14, 14), heads=4, causal=True)


def test_half_precision_stays_near():
    ours, grid = attention(reduction=2), Grid(14, 14)
    x = tokens(grid)
    want = ours(x, grid)
    torch.testing.assert_close(ours.bfloat16()(x.bfloat16(), grid).double(), want, rtol=5e-2, atol=5e-2)
