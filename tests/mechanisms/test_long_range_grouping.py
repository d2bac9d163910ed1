"""Long-range grouping: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.routed.long_range_grouping import (
    LongRangeBlock,
    LongRangeGrouping,
    SimilarTokenMerger,
)


def layer(**options):
    torch.manual_seed(0)
    return LongRangeGrouping(**{"dim": 8, "heads": 2, **options}).double()


def tokens(grid, batch=2):
    return torch.randn(batch, grid.numel, 8, dtype=torch.float64)


def own(module, x, grid):
    """The signature of every view by itself."""
    v = merge_heads(module.qkv(x)[2]).unflatten(1, grid.sizes)
    maps = [module.signature(view.movedim(-1, 1)).flatten(2).transpose(1, 2) for view in v.unbind(1)]
    return torch.cat(maps, dim=1)


def test_one_group_is_joint_attention_over_all_views():
    grid, module = Grid(3, 4, 5), layer(group=1)
    x = tokens(grid)
    expected = module.proj(merge_heads(attend(*module.qkv(x))) + own(module, x, grid))
    torch.testing.assert_close(module(x, grid), expected)


def test_one_view_one_group_and_no_signature_is_plain_attention():
    grid, module = Grid(4, 5), layer(group=1)
    x = tokens(grid)
    torch.nn.init.zeros_(module.signature.weight)
    torch.nn.init.zeros_(module.signature.bias)
    expected = module.proj(merge_heads(attend(*module.qkv(x))))
    torch.testing.assert_close(module(x, grid), expected)
    without = layer(group=1, signature=False)
    without.load_state_dict({n: p for n, p in module.state_dict().items() if "signature" not in n})
    torch.testing.assert_close(without(x, grid), expected)
    torch.testing.assert_close(module(x, Grid(1, 4, 5)), expected)


def test_the_order_of_views_does_not_matter():
    grid, module, order = Grid(4, 6, 6), layer(group=3), [2, 0, 3, 1]
    x = tokens(grid)
    moved = x.unflatten(1, grid.sizes)[:, order].flatten(1, 3)
    expected = module(x, grid).unflatten(1, grid.sizes)[:, order].flatten(1, 3)
    torch.testing.assert_close(module(moved, grid), expected)


def test_a_stride_as_long_as_the_map_looks_across_views_only():
    grid, module = Grid(3, 4, 4), layer(group=4, signature=False)
    x = tokens(grid)
    places = x.unflatten(1, (3, 16)).transpose(1, 2).flatten(0, 1)  # (b * 16, 3, c)
    alone = module.proj(merge_heads(attend(*module.qkv(places))))
    expected = alone.unflatten(0, (2, 16)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(module(x, grid), expected)


def test_groups_are_the_phases_of_the_stride():
    grid, module = Grid(2, 14, 14), layer(group=7, signature=False)
    x = tokens(grid, 1)
    maps = x.unflatten(1, grid.sizes)
    for y, column in ((0, 0), (3, 6)):
        group = maps[:, :, y::7, column::7].flatten(1, 3)
        expected = module.proj(merge_heads(attend(*module.qkv(group))))
        ours = module(x, grid).unflatten(1, grid.sizes)[:, :, y::7, column::7].flatten(1, 3)
        torch.testing.assert_close(ours, expected)


def test_ungrouped_layers_stay_in_their_view():
    grid, module = Grid(3, 4, 5), layer(grouped=False)
    x = tokens(grid)
    views = x.unflatten(1, (3, 20)).flatten(0, 1)
    expected = module.proj(merge_heads(attend(*module.qkv(views)))).unflatten(0, (2, 3)).flatten(1, 2)
    torch.testing.assert_close(module(x, grid), expected)
    assert module.signature is None


def test_pairs_are_those_of_the_groups():
    for views in (1, 4, 16):
        grid = Grid(views, 14, 14)
        n = grid.numel
        shape = (1, 12, n, 64)
        found = explain(shape, shape, shape, where=layer(group=7).where(grid))
        assert found.pairs_needed == found.pairs_computed == 12 * n * n // 49
        assert found.partial_tiles == 0


def test_sizes_the_stride_does_not_divide():
    grid, module = Grid(2, 5, 7), layer(group=3)
    assert module(tokens(grid), grid).isfinite().all()
    assert int(module.where(grid).dense().sum(1).min()) == 2 * 1 * 2


def test_the_block_trains():
    block, grid = LongRangeBlock(dim=8, heads=2, group=2), Grid(2, 4, 4)
    block(torch.randn(2, 32, 8), grid).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def merger(**options):
    torch.manual_seed(0)
    options = {"dim": 8, "heads": 2, "tokens": 5, "neighbours": 3, **options}
    return SimilarTokenMerger(**options).double()


def test_merging_leaves_few_tokens_and_every_parameter_learns():
    module, x = merger(), torch.randn(2, 30, 8, dtype=torch.float64, requires_grad=True)
    out, labels = module(x)
    assert out.shape == (2, 5, 8)
    assert sorted(set(labels.flatten().tolist())) == [0, 1, 2, 3, 4]
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_it_is_the_equation():
    module, x = merger(), torch.randn(2, 30, 8, dtype=torch.float64)
    out, labels = module(x)
    z = module.norm1(x)
    score = module.score(z)
    weight = score.exp() * torch.nn.functional.one_hot(labels, 5)  # (b, n, m)
    merged = weight.transpose(1, 2) @ z / (weight.sum(1) + 1e-6)[..., None]
    q, k, v = (split_heads(m(y), 2) for m, y in ((module.q, merged), (module.k, z), (module.v, z)))
    logits = q @ k.transpose(-1, -2) / 2 + score.transpose(1, 2)[:, None]
    y = merged + module.proj(merge_heads(logits.softmax(-1) @ v))
    torch.testing.assert_close(out, y + module.mlp(module.norm2(y)))


def test_as_many_clusters_as_tokens_keep_all_of_them():
    module, x = merger(tokens=12), torch.randn(1, 12, 8, dtype=torch.float64)
    assert sorted(module(x).labels[0].tolist()) == list(range(12))


def test_the_order_of_tokens_does_not_matter_to_the_merger():
    module, x = merger(), torch.randn(1, 30, 8, dtype=torch.float64)
    order = torch.randperm(30)
    torch.testing.assert_close(module(x[:, order]).out, module(x).out)


def test_noise_is_handed_or_drawn():
    module, x = merger(), torch.randn(2, 30, 8, dtype=torch.float64)
    assert torch.equal(module(x).out, module(x).out)
    drawn = module(x, generator=torch.Generator().manual_seed(0))
    again = module(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.out, again.out)
    noise = torch.zeros(2, 30, dtype=torch.float64)
    noise[:, 7] = 5.0  # by far the densest, so that it is the first centre
    assert (module(x, noise=noise).labels[:, 7] == 0).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: layer(group=0), "group"),
        (lambda: merger(tokens=0), "tokens"),
        (lambda: merger(neighbours=0), "neighbours"),
        (lambda: merger()(torch.randn(1, 4, 8, dtype=torch.float64)), "count"),
        (lambda: merger()(torch.randn(1, 30, 7, dtype=torch.float64)), "x"),
    ],
)
def test_bad_options_are_named(make, name):
    with pytest.raises(ArgumentError, match=rf"^{name}:"):
        make()
