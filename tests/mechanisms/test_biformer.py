"""BiFormer: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.routed.biformer import BiFormerBlock, BiLevelRoutingAttention


def layer(dim=8, heads=2, **options):
    return BiLevelRoutingAttention(dim=dim, heads=heads, **options).double()


def dense(module, x, grid):
    q, k, v = module.qkv(x)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=module.dim**-0.5)
    near = module.lepe(merge_heads(v).transpose(1, 2).unflatten(2, grid.sizes)).flatten(2).transpose(1, 2)
    return module.proj(merge_heads(out) + near)


@pytest.mark.parametrize(
    "options", [{"regions": 3, "topk": 9}, {"regions": 3, "topk": -1}, {"regions": 1, "topk": 1}]
)
@pytest.mark.parametrize("grid", [Grid(6, 9), Grid(5, 7)])
def test_all_regions_are_full_attention(options, grid):
    if grid == Grid(5, 7) and options["topk"] == 9:
        options = {**options, "topk": -1}
    module, x = layer(**options), torch.randn(2, grid.numel, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid), dense(module, x, grid))


def test_a_region_need_not_choose_itself():
    module, grid = layer(regions=2, topk=1, local_kernel=0, qkv_bias=False), Grid(4, 4)
    with torch.no_grad():
        module.qkv.weight[:8] = torch.eye(8)
        module.qkv.weight[8:16] = -torch.eye(8)  # like repels like
    _, _, chosen = module.forward_routed(torch.randn(1, 16, 8, dtype=torch.float64), grid)
    assert (chosen[0, :, 0] != torch.arange(4)).all()


def test_permuting_regions_permutes_outputs_without_the_convolution():
    module, grid = layer(regions=2, topk=2, local_kernel=0), Grid(4, 6)
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    tokens = module.cut(grid).tokens
    order = torch.tensor([2, 0, 3, 1])
    moved = torch.empty(24, dtype=torch.long)
    moved[tokens.flatten()] = tokens[order].flatten()
    torch.testing.assert_close(module(x[:, moved], grid), module(x, grid)[:, moved])


def test_no_gradient_goes_through_the_choice():
    module, grid = layer(regions=2, topk=2), Grid(4, 4)
    x = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    _, weights, _ = module.forward_routed(x, grid)
    assert not weights.requires_grad


def test_computed_pairs_follow_topk():
    from foveate.routing.regions import select_regions

    module, grid = layer(regions=4, topk=3), Grid(8, 8)
    _, _, chosen = module.forward_routed(torch.randn(1, 64, 8, dtype=torch.float64), grid)
    assert select_regions(module.cut(grid), chosen).dense().sum() == 64 * 3 * 4


def test_padding_as_the_authors_do_attends_to_padding():
    grid, x = Grid(5, 5), torch.randn(1, 25, 8, dtype=torch.float64)
    ours = layer(regions=2, topk=4)
    for official in ("tokens", "keys"):
        theirs = layer(regions=2, topk=4 if official == "tokens" else 9, official=official)
        theirs.load_state_dict(ours.state_dict())
        assert theirs(x, grid).shape == x.shape
        assert not torch.allclose(theirs(x, grid), ours(x, grid))
        # where regions divide the map the three agree
        even, tokens = Grid(4, 4), torch.randn(1, 16, 8, dtype=torch.float64)
        theirs.topk = 4
        torch.testing.assert_close(theirs(tokens, even), ours(tokens, even))


def test_block_keeps_the_shape_and_trains():
    block, grid = BiFormerBlock(dim=8, heads=2, regions=2, topk=2), Grid(4, 6)
    x = torch.randn(2, 24, 8)
    block(x, grid).square().mean().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert isinstance(block.mlp[1], nn.GELU)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"topk": 0}, "topk"), ({"local_kernel": 4}, "local_kernel"), ({"official": "yes"}, "official")],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)


def test_more_regions_than_there_are_is_refused():
    with pytest.raises(ArgumentError, match="topk"):
        layer(regions=2, topk=5)(torch.randn(1, 16, 8, dtype=torch.float64), Grid(4, 4))
    with pytest.raises(ArgumentError, match="count"):
        layer(regions=7)(torch.randn(1, 16, 8, dtype=torch.float64), Grid(4, 4))
