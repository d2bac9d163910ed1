"""Combiner: what its equations promise, for all four factorisations."""

import math

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.banks import attend_groups, join_banks
from foveate.mechanisms.routed.combiner import Combiner, near_root, rowmajor_banks
from foveate.patterns.basic import Causal

VARIANTS = ["sqrt", "logn", "rowmajor", "mixture"]
each = pytest.mark.parametrize("variant", VARIANTS)
either = pytest.mark.parametrize("causal", [False, True])


def layer(variant, dim=8, heads=2, **options):
    torch.manual_seed(0)
    return Combiner(dim=dim, heads=heads, variant=variant, **options).double()


def weights(module, n):
    """The attention as an N x N matrix per head: what comes out when values are unit vectors."""
    grid = Grid(n)
    q, k, _ = module.qkv(torch.randn(1, n, 8, dtype=torch.float64))
    eye = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)
    if module.variant == "rowmajor":  # any keys of rows will do
        row, causal = module.size(grid), module.causal
        return attend_groups(q, rowmajor_banks(q, k, eye, row=row, causal=causal, keys_of=lambda over: k))
    return attend_groups(q, module.banks(q, k, eye, grid))


@each
@either
@pytest.mark.parametrize("n", [1, 2, 9, 12, 17, 30])
def test_every_token_reaches_every_token_it_may_see(variant, causal, n):
    seen = weights(layer(variant, causal=causal), n)
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen[..., 0]))
    allowed = Causal().dense(n) if causal else torch.ones(n, n, dtype=torch.bool)
    assert (seen[..., allowed] > 0).all()
    assert (seen[..., ~allowed] == 0).all()


@each
def test_a_token_changes_nothing_before_it(variant):
    module, grid = layer(variant, causal=True, segment=4), Grid(12)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    before = module(x, grid)
    for t in range(12):
        changed = x.clone()
        changed[:, t] += 3 * torch.randn(8, dtype=torch.float64)
        after = module(changed, grid)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t])


@either
@pytest.mark.parametrize(
    ("variant", "n", "segment"),
    [
        *[("sqrt", 13, s) for s in (1, 13, 20)],
        *[("rowmajor", 13, 13), ("mixture", 13, 1), ("mixture", 13, 13)],
        *[("logn", 2, None), ("logn", 1, None)],
    ],
)
def test_one_segment_or_row_is_exact_attention(variant, n, segment, causal):
    module = layer(variant, segment=segment, causal=causal)
    q, k, v = module.qkv(torch.randn(2, n, 8, dtype=torch.float64))
    x = torch.randn(2, n, 8, dtype=torch.float64)
    ours = attend_groups(q, module.banks(q, k, v, Grid(n), x))
    torch.testing.assert_close(ours, attend(q, k, v, where=Causal() if causal else None))


@either
def test_equal_keys_of_a_region_count_once(causal):
    n, s = 12, 4
    module = layer("sqrt", segment=s, causal=causal)
    q, k, v = module.qkv(torch.randn(2, n, 8, dtype=torch.float64))
    k = k[:, :, ::s].repeat_interleave(s, 2)
    segment = torch.arange(n) // s
    far = (segment[:, None] != segment).double() * -math.log(s)
    expected = attend(q, k, v, where=Causal() if causal else None, mask=far)
    torch.testing.assert_close(attend_groups(q, module.banks(q, k, v, Grid(n))), expected)


def test_the_authors_levels_lose_the_past_of_the_last_token():
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    ours, theirs = (layer("logn", causal=True, official=official) for official in (False, True))
    torch.testing.assert_close(ours(x[:, :16], Grid(16)), theirs(x[:, :16], Grid(16)))
    torch.testing.assert_close(ours(x, Grid(17))[:, :16], theirs(x, Grid(17))[:, :16])
    alone = theirs.proj(theirs.qkv(x[:, 16:])[2].transpose(1, 2).flatten(2))
    torch.testing.assert_close(theirs(x, Grid(17))[:, 16:], alone)
    assert not torch.allclose(ours(x, Grid(17))[:, 16:], alone)


@each
def test_gradients_reach_everything(variant):
    module, grid = layer(variant, causal=True), Grid(5, 6)
    x = torch.randn(2, 30, 8, dtype=torch.float64, requires_grad=True)
    module(x, grid).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert x.grad is not None


def explained(variant, n, causal=True):
    """What attention costs a layer, for one batch element and head."""
    module = Combiner(dim=8, heads=1, variant=variant, causal=causal)
    q = torch.zeros(1, 1, n, 8)
    groups = module.banks(q, q, q, Grid(n), torch.zeros(1, n, 8))
    return [explain(q, **join_banks(group, n)._asdict(), backend="tiles") for group in groups]


def pairs(variant, n, causal=True):
    return sum(found.pairs_needed for found in explained(variant, n, causal))


@pytest.mark.parametrize("variant", ["sqrt", "rowmajor", "mixture"])
def test_hardly_more_pairs_are_computed_than_needed(variant):
    computed = sum(found.pairs_computed for found in explained(variant, 1024))
    assert computed < 3 * pairs(variant, 1024) < 1024 * 1024 / 3


@pytest.mark.parametrize("variant", ["sqrt", "rowmajor", "mixture"])
def test_pairs_grow_with_the_power_of_three_halves(variant):
    counts = [pairs(variant, n) for n in (64, 256, 1024)]
    assert [a / b for a, b in zip(counts[1:], counts, strict=False)] == pytest.approx([8, 8], rel=0.15)


def test_pairs_of_logn_grow_with_the_logarithm():
    for n in (32, 128, 512):
        assert pairs("logn", n) == n + n // 2 * int(math.log2(n))
        assert pairs("logn", n, causal=False) == n + n * int(math.log2(n))


def test_rows_are_those_of_the_grid():
    module = layer("mixture")
    assert module.size(Grid(3, 5)) == 5
    assert module.size(Grid(2, 3, 4)) == 4
    assert [near_root(n) for n in (1, 12, 13, 36, 48)] == [1, 4, 13, 6, 8]
    assert layer("sqrt").size(Grid(13)) == 4


@pytest.mark.parametrize(
    ("options", "name"), [({"variant": "log"}, "variant"), ({"variant": "sqrt", "segment": 0}, "segment")]
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)


def test_rows_must_divide():
    with pytest.raises(ArgumentError, match="segment: expected a divisor of the 12 tokens"):
        layer("mixture", segment=5)(torch.randn(1, 12, 8, dtype=torch.float64), Grid(12))
    q = torch.randn(1, 2, 12, 4, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="x: expected the tokens"):
        layer("rowmajor").banks(q, q, q, Grid(12))
