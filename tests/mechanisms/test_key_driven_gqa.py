"""Key-driven GQA: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.key_driven_gqa import (
    KeyDrivenAttention,
    convert,
    key_norms,
    norm_shares,
    perturb,
    pool_heads,
)
from foveate.routing.apportion import apportion

GRID = Grid(9)


def layer(groups="gqa", heads=8, kv_heads=4, dim=32, **options):
    return KeyDrivenAttention(dim=dim, heads=heads, kv_heads=kv_heads, groups=groups, **options).double()


def data(n=9, dim=32, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def repeated(module, x, sizes):
    """The layer with keys and values repeated for every query head."""
    q = split_heads(module.q(x), module.heads)
    k, v = (split_heads(part(x), module.kv_heads) for part in (module.k, module.v))
    at = torch.repeat_interleave(torch.arange(module.kv_heads), torch.as_tensor(sizes))
    return module.proj(merge_heads(attend(q, k[:, at], v[:, at])))


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_equal_groups_are_gqa_from_multi_head_to_multi_query(kv_heads):
    module, x = layer(kv_heads=kv_heads), data()
    torch.testing.assert_close(module(x, GRID), repeated(module, x, [8 // kv_heads] * kv_heads))


def test_groups_follow_the_norms_and_repeating_gives_the_same():
    module, x = layer("kdgqa"), data()
    with torch.no_grad():
        for g, factor in enumerate((3.0, 1.0, 2.0, 0.1)):
            module.k.weight[g * 4 : g * 4 + 4] *= factor
    k = split_heads(module.k(x), 4)
    sizes = module.allocate(k)
    norms = key_norms(k)
    share = (norms - norms.min()) / (norms.max() - norms.min())
    assert sizes.sum() == 8
    assert ((sizes - 8 * share / share.sum()).abs() <= 1).all()
    assert apportion(norm_shares(torch.tensor([4.0, 1.0, 2.0, 0.0])), 8).tolist() == [5, 1, 2, 0]
    torch.testing.assert_close(module(x, GRID), repeated(module, x, sizes))


def test_a_key_head_without_queries_does_not_count():
    module, x = layer("kdgqa"), data()
    with torch.no_grad():
        for g, factor in enumerate((4.0, 1.0, 2.0, 0.0)):
            module.k.weight[g * 4 : g * 4 + 4] = factor * torch.eye(4, 32)
    sizes = module.allocate(split_heads(module.k(x), 4))
    assert sizes.tolist() == [5, 1, 2, 0]
    empty = 3
    before = module(x, GRID)
    with torch.no_grad():
        module.v.weight[empty * 4 : empty * 4 + 4] += 7
    torch.testing.assert_close(module(x, GRID), before)


@pytest.mark.parametrize("groups", ["kdgqa", "dgqa"])
def test_equal_norms_are_equal_groups_and_no_nan(groups):
    module, x = layer(groups, window=1), data()
    nn.init.zeros_(module.k.weight)
    for _ in range(2):
        assert module.train()(x, GRID).isfinite().all()
    torch.testing.assert_close(module.eval()(x, GRID), repeated(module, x, [2, 2, 2, 2]))
    assert norm_shares(torch.full((4,), 3.0)).eq(1).all()


def test_kdgqa_couples_the_batch_and_trained_dgqa_does_not():
    torch.manual_seed(0)
    kdgqa, dgqa = layer("kdgqa"), layer("dgqa", window=1)
    x = data(batch=16) * torch.logspace(-1, 1, 32, dtype=torch.float64)
    dgqa.train()(x, GRID)
    for module, coupled in ((kdgqa.eval(), True), (dgqa.eval(), False)):
        alone = torch.cat([module(one[None], GRID) for one in x])
        assert torch.allclose(alone, module(x, GRID)) is not coupled


def test_dgqa_changes_groups_at_the_end_of_a_window_only():
    module, x = layer("dgqa", window=3, ratio="ema"), data()
    assert module.sizes.tolist() == [2, 2, 2, 2]
    with torch.no_grad():
        module.k.weight[:4] *= 50
    module.train()
    for _ in range(2):
        module(x, GRID)
        assert module.sizes.tolist() == [2, 2, 2, 2]
        assert module.cache.eq(0).all()
    module(x, GRID)
    norms = key_norms(split_heads(module.k(x), 4))
    assert module.sizes.tolist() == [8, 0, 0, 0]
    torch.testing.assert_close(module.cache, norms / 3)
    module(x, GRID, step=6)
    torch.testing.assert_close(module.cache, (norms / 3 + norms) / 3)


def test_evaluation_changes_nothing_where_the_authors_go_on():
    x, y = data(), 30 * data()
    for official in (False, True):
        module = layer("dgqa", window=1, official=official).train()
        module(x, GRID)
        kept = module.cache.clone(), module.sizes.clone()
        module.eval()(y, GRID)
        assert module.cache.equal(kept[0]) is not official
        assert official or module.sizes.equal(kept[1])


def test_averaging_equal_heads_changes_nothing():
    head = torch.randn(3, 4, 4, 32, dtype=torch.float64)
    qkv = head.clone()
    weight = torch.cat(
        [
            torch.randn(32, 32, dtype=torch.float64),
            *(part.repeat_interleave(2, 0).flatten(0, 1) for part in qkv[1:]),
        ]
    )
    bias = torch.randn(96, dtype=torch.float64).view(3, 4, 2, 4)
    bias = bias[:, :, :1].expand(-1, -1, 2, -1).flatten()
    full, ours = layer(kv_heads=8, qkv_bias=True), layer(kv_heads=4, qkv_bias=True)
    full.load_state_dict(convert(weight, bias, 8, 8) | full.proj.state_dict(prefix="proj."))
    ours.load_state_dict(convert(weight, bias, 8, 4) | full.proj.state_dict(prefix="proj."))
    assert ours.k.weight.numel() == full.k.weight.numel() // 2
    x = data()
    torch.testing.assert_close(ours(x, GRID), full(x, GRID))


def test_noise_has_the_mean_and_deviation_of_each_row_and_a_generator():
    out = torch.randn(2, 4, 6, 3, dtype=torch.float64) * 3 + 1
    draws = [perturb(out, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    rows, noise = out.flatten(2), (out - draws[0]).flatten(2)
    torch.testing.assert_close(noise.mean(-1), rows.mean(-1))
    torch.testing.assert_close(noise.std(-1), rows.std(-1))
    # The diagonal was zero, the least of a uniform draw, before its row was scaled.
    assert noise.unflatten(1, (2, 2)).diagonal(dim1=2, dim2=3)[0, 0, 0] == noise[0, 0].min()


def test_noise_is_for_training():
    module, x = layer("pgqa"), data()
    torch.testing.assert_close(module.eval()(x, GRID), repeated(module, x, [2, 2, 2, 2]))
    assert not torch.allclose(module.train()(x, GRID), repeated(module, x, [2, 2, 2, 2]))
    official = layer("pgqa", official=True).eval()
    one, same = (official(x, GRID, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.equal(same)
    assert not torch.allclose(one, repeated(official, x, [2, 2, 2, 2]))


def test_bad_options_are_named():
    for options in ({"kv_heads": 3}, {"groups": "mqa"}, {"ratio": "mean"}, {"window": 0}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            layer(**options)
    with pytest.raises(ArgumentError, match="kv_heads"):
        pool_heads(torch.randn(8, 4), 4, 3)
    with pytest.raises(ArgumentError, match="x:"):
        pool_heads(torch.randn(9, 4), 4, 2)
    with pytest.raises(ArgumentError, match="causal"):
        KeyDrivenAttention.for_workload(dim=8, grid=GRID, heads=2, causal=True)
