"""CATANet: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.routed.catanet import PatchBlock, TokenAggregation, TokenAggregationBlock, halved
from foveate.patterns.overlap import overlap_tokens
from foveate.routing.centres import nearest
from foveate.routing.sorted_groups import sorted_groups


def layer(dim=8, heads=2, **options):
    return TokenAggregation(dim=dim, heads=heads, **options).double().eval()


def tokens(n=24, batch=2, dim=8):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def projected(module, x, centres=None):
    parts = (
        (module.centre_k, module.centre_v) if centres is not None else (module.to_q, module.to_k, module.to_v)
    )
    return [split_heads(part(x if centres is None else centres[None]), module.heads) for part in parts]


@pytest.mark.parametrize("official", [False, True])
def test_one_group_is_full_attention_plus_the_centres(official):
    module, x = layer(group=100, clusters=5, official=official), tokens()
    module.centres.initted.fill_(True)
    q, k, v = projected(module, x)
    far = attend(q, *projected(module, x, module.centres.means))
    # Reflected, every key occurs twice, which changes no softmax.
    torch.testing.assert_close(module(x, Grid(4, 6)), module.proj(merge_heads(attend(q, k, v) + far)))


def test_one_centre_adds_its_value_everywhere():
    module, x = layer(group=4, clusters=1), tokens()
    q, k, v = projected(module, x)
    near = attend(q, k, v, where=sorted_groups(torch.arange(24).expand(2, -1), 4))
    value = module.centre_v(module.centres.means)[None]
    torch.testing.assert_close(module(x, Grid(24)), module.proj(merge_heads(near) + value))


def test_tokens_of_a_cluster_are_neighbours_and_go_back_to_their_places():
    module, x = layer(group=4, clusters=3), tokens()
    _, order = module.forward_sorted(x, Grid(24))
    ids = nearest(x, module.centres.means)
    assert (ids.gather(1, order).diff(dim=1) >= 0).all()
    same = ids.gather(1, order).diff(dim=1) == 0
    assert (order.diff(dim=1)[same] > 0).all()  # ties stay in the order of the map
    # With the centres fixed, permuting tokens permutes outputs up to the order of ties: none with one group.
    free, moved = layer(group=24, clusters=3), torch.randperm(24)
    torch.testing.assert_close(free(x[:, moved], Grid(24)), free(x, Grid(24))[:, moved])


def test_samples_are_independent_in_evaluation_and_not_in_training():
    module, x = layer(group=4, clusters=3), tokens()
    torch.testing.assert_close(module(x, Grid(24))[:1], module(x[:1], Grid(24)))
    module.train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    together = module(x, Grid(24))[:1]
    module.load_state_dict(state)
    assert not torch.allclose(together, module(x[:1], Grid(24)))


def test_training_moves_the_centres_by_the_decay():
    module, x = layer(group=4, clusters=3, decay=0.5).train(), tokens()
    module(x, Grid(24))
    first = module.centres.means.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3, dtype=torch.float64))
    module(tokens(), Grid(24))
    assert not module.centres.means.equal(first)
    after = module.centres.means.clone()
    module.eval()(tokens(), Grid(24))
    assert module.centres.means.equal(after)


def test_an_order_of_ones_own_must_sort_by_centre():
    module, x = layer(group=4, clusters=3), tokens()
    out, order = module.forward_sorted(x, Grid(24))
    torch.testing.assert_close(module.forward_sorted(x, Grid(24), order=order)[0], out)
    for wrong in (order.flip(1), torch.zeros_like(order), order[:, 1:]):
        with pytest.raises(ArgumentError, match="order"):
            module.forward_sorted(x, Grid(24), order=wrong)


def test_pairs_grow_with_the_group_not_with_the_square():
    for n in (64, 128, 256):
        where = sorted_groups(torch.randperm(n)[None], 16)
        assert where.schedule.pairs_needed == n * 32


def test_queries_may_be_narrower_than_values():
    module = layer(qk_dim=4)
    assert module.to_q.out_features == 4
    assert module(tokens(), Grid(4, 6)).shape == (2, 24, 8)


def test_the_authors_reflection_changes_the_end_of_the_order_only():
    ours, theirs, x = layer(group=5, clusters=1), layer(group=5, clusters=1, official=True), tokens()
    theirs.load_state_dict(ours.state_dict())
    theirs.centres.initted.fill_(True)
    ids = torch.arange(24).expand(2, -1)
    a, b = (m.forward_sorted(x, Grid(24), order=ids)[0] for m in (ours, theirs))
    torch.testing.assert_close(a[:, :15], b[:, :15])
    assert not torch.allclose(a[:, 15:], b[:, 15:])


def test_blocks_keep_the_shape_and_train():
    x, grid = torch.randn(2, 48, 8), Grid(6, 8)
    for block in (
        TokenAggregationBlock(dim=8, heads=2, mlp_dim=12, clusters=3, group=8),
        PatchBlock(dim=8, heads=2, mlp_dim=12, patch=5),
    ):
        out = block(x, grid)
        out.square().mean().backward()
        assert out.shape == x.shape
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("grid", [Grid(5, 8), Grid(9, 11), Grid(3, 2)])
def test_patches_are_averaged_exactly_and_halving_is_not_where_three_meet(grid):
    ours = PatchBlock(dim=8, heads=2, mlp_dim=8, patch=5).double()
    theirs = PatchBlock(dim=8, heads=2, mlp_dim=8, patch=5, official=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = tokens(grid.numel)
    size = tuple(min(5, n) for n in grid)
    share, count = halved(grid, size, tuple(min(3, s) for s in size))
    exact = share * count == 1
    torch.testing.assert_close(
        count, overlap_tokens(grid, size, tuple(min(3, s) for s in size)).flatten().bincount().float()
    )
    assert exact.all() == (grid != Grid(9, 11))
    with torch.no_grad():
        for block in (ours, theirs):
            for parameter in (block.ffn.fc2.weight, block.ffn.fc2.bias):
                parameter.zero_()
    a, b = ours(x, grid), theirs(x, grid)
    torch.testing.assert_close(a[:, exact], b[:, exact])
    if not exact.all():
        torch.testing.assert_close(b[:, ~exact], a[:, ~exact] * (share * count).double()[~exact][:, None])


def test_low_precision_is_near():
    module, x = layer(group=8, clusters=1), tokens()
    truth = module(x, Grid(24))
    low = module.to(torch.bfloat16)(x.bfloat16(), Grid(24))
    assert (low.double() - truth).abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"qk_dim": 3}, "qk_dim"),
        ({"clusters": 0}, "clusters"),
        ({"group": 0}, "group"),
        ({"decay": 2}, "decay"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)
    with pytest.raises(ArgumentError, match="patch"):
        PatchBlock(dim=8, heads=2, mlp_dim=8, patch=2)
    with pytest.raises(ArgumentError, match="qk_dim"):
        PatchBlock(dim=8, heads=2, mlp_dim=8, qk_dim=3)
