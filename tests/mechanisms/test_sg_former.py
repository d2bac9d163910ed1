"""SG-Former: what its equations promise."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.routed.sg_former import (
    RATES,
    EnhancedAttention,
    GuidedAttention,
    HybridScaleAttention,
    SelfGuidedAttention,
)


def tokens(grid, batch=2, dim=8):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def hybrid(grid=None, **options):
    return HybridScaleAttention(dim=8, heads=4, **{"reduction": 2, "window": 3, **options}).double()


def guided(**options):
    return GuidedAttention(dim=8, heads=4, **{"rates": (2, 1), **options}).double()


def maps(module, x, grid):
    """Both softmax maps of a hybrid layer, written out."""
    pads = (0, -grid[1] % module.reduction, 0, -grid[0] % module.reduction)
    image = functional.pad(x.transpose(1, 2).unflatten(2, grid.sizes), pads)
    reduced = functional.gelu(module.norm(module.sr(image).flatten(2).transpose(1, 2)))
    scale = (module.dim // module.heads) ** -0.5
    q1, k1 = split_heads(module.q1(x), 2), split_heads(module.kv1(reduced).chunk(2, -1)[0], 2)
    q2, k2 = split_heads(module.q2(x), 2), split_heads(module.kv2(x).chunk(2, -1)[0], 2)
    near = (q2 @ k2.mT * scale).masked_fill(~module.windows(grid).dense(), float("-inf"))
    return (q1 @ k1.mT * scale).softmax(-1), near.softmax(-1)


def test_the_last_stage_is_full_attention_with_its_enhancement():
    grid, module = Grid(3, 5), EnhancedAttention(dim=8, heads=2).double()
    x = tokens(grid)
    q, k, v = (split_heads(part, 2) for part in (module.q(x), *module.kv(x).chunk(2, -1)))
    out = merge_heads(functional.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(module(x, grid), module.proj(out + module.lepe(x, grid)))


@pytest.mark.parametrize("grid", [Grid(6, 6), Grid(5, 7), Grid(2, 2)])
def test_significance_is_the_mean_attention_a_token_receives(grid):
    module, x = hybrid(), tokens(grid)
    out, significance = module.forward_significant(x, grid)
    far, near = maps(module, x, grid)
    cells = tuple(-(-n // 2) for n in grid)
    spread = far.mean((1, 2)).unflatten(1, cells).repeat_interleave(2, 1).repeat_interleave(2, 2)
    spread = spread[:, : grid[0], : grid[1]].flatten(1)
    local = near.mean(1).sum(1) / module.windows(grid).dense().sum(0)
    torch.testing.assert_close(significance, spread + local)
    torch.testing.assert_close(out, module(x, grid))


def test_no_gradient_goes_through_significance():
    grid, module = Grid(6, 6), SelfGuidedAttention(dim=8, heads=4, reduction=2, window=3).double()
    x = tokens(grid).requires_grad_()
    h, significance = module.hybrid.forward_significant(x, grid)
    assert not significance.requires_grad
    (mine,) = torch.autograd.grad(module(x, grid).square().sum(), x)
    (theirs,) = torch.autograd.grad((h + module.guided(x + h, grid, significance)).square().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_windows_of_the_map_and_no_reduction_are_full_attention():
    grid = Grid(4, 5)
    module, x = hybrid(reduction=1, window=7), tokens(grid)
    far, near = maps(module, x, grid)
    reduced = functional.gelu(module.norm(module.sr(x.mT.unflatten(2, (4, 5))).flatten(2).mT))
    v1, v2 = (split_heads(kv.chunk(2, -1)[1], 2) for kv in (module.kv1(reduced), module.kv2(x)))
    out = merge_heads(torch.cat([far @ v1, near @ v2], 1))
    torch.testing.assert_close(module(x, grid), module.proj(out + module.lepe(x, grid)))


def test_guidance_decides_what_is_merged():
    grid, module = Grid(4, 6), guided(rates=(6, 3, 2))
    x = tokens(grid)
    a, b = torch.rand(2, 24), torch.rand(2, 24)
    assert not torch.allclose(module(x, grid, a), module(x, grid, b))
    # Any growing function of the significance sorts alike, and a map for each half may be given.
    torch.testing.assert_close(module(x, grid, a), module(x, grid, a.exp() * 3))
    torch.testing.assert_close(module(x, grid, a), module(x, grid, torch.stack([a, a], 1)))
    assert not torch.allclose(module(x, grid, a), module(x, grid, torch.stack([a, b], 1)))


def test_rates_of_one_are_full_attention_in_any_order():
    grid, module = Grid(3, 4), guided(rates=(1,))
    x = tokens(grid)
    with torch.no_grad():
        module.merge.levels[0].weight.fill_(1.0)
        module.merge.levels[0].bias.zero_()
    k, v = (
        torch.cat([split_heads(part, 2) for part in pair], 1)
        for pair in zip(module.kv1(x).chunk(2, -1), module.kv2(x).chunk(2, -1), strict=True)
    )
    full = merge_heads(attend(split_heads(module.q(x), 4), k, v))
    out = module(x, grid, torch.rand(2, 12))
    torch.testing.assert_close(out, module.proj(full + module.lepe(x, grid)))


def test_half_the_heads_break_ties_column_by_column():
    grid, module = Grid(2, 3), guided(rates=(3, 3))
    x, flat = tokens(grid), torch.zeros(2, 6)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    rank = torch.empty(6)
    rank[order] = torch.arange(6.0)
    told = torch.stack([torch.arange(6.0), rank]).expand(2, 2, 6)
    torch.testing.assert_close(module(x, grid, flat), module(x, grid, told))


def test_published_maps_have_sixty_keys():
    for side, reduction in ((56, 8), (28, 4)):
        assert GuidedAttention(dim=8, heads=2, rates=RATES[reduction]).merge.length(side * side) == 60


def test_pairs_of_windows_grow_linearly():
    for side in (14, 28, 56):
        module = HybridScaleAttention(dim=8, heads=2)
        shape = (1, 1, side * side, 4)
        assert (
            explain(shape, shape, shape, where=module.windows(Grid(side, side))).pairs_needed == 49 * side**2
        )


def test_low_precision_is_near():
    grid, module = Grid(6, 6), hybrid()
    x = tokens(grid)
    out, significance = module.forward_significant(x, grid)
    low, rough = module.to(torch.bfloat16).forward_significant(x.bfloat16(), grid)
    assert (low.double() - out).abs().max() < 0.1 * out.abs().max()
    assert (rough.double() - significance).abs().max() < 0.1 * significance.abs().max()


def test_odd_numbers_of_heads_are_doubled_for_a_workload():
    assert SelfGuidedAttention.for_workload(dim=24, grid=Grid(8, 8), heads=3).heads == 6
    assert SelfGuidedAttention.for_workload(dim=24, grid=Grid(8, 8), heads=4).heads == 4
    with pytest.raises(ArgumentError, match="heads"):
        SelfGuidedAttention.for_workload(dim=9, grid=Grid(8, 8), heads=3)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: HybridScaleAttention(dim=9, heads=3), "heads"),
        (lambda: GuidedAttention(dim=9, heads=3), "heads"),
        (lambda: hybrid(reduction=0), "reduction"),
        (lambda: hybrid(window=0), "window"),
        (lambda: SelfGuidedAttention(dim=8, heads=2, reduction=3), "reduction"),
        (lambda: guided()(tokens(Grid(4)), Grid(2, 2), torch.rand(2, 3)), "significance"),
        (lambda: guided()(tokens(Grid(4)), Grid(4), torch.rand(2, 4)), "grid"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ArgumentError, match=name):
        make()
