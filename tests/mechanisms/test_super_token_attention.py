"""Super token attention: what its equations promise."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.routed.super_token_attention import Association, SuperTokenAttention, SuperTokenLayer
from foveate.patterns.coarse import Around, Within


def layer(dim=8, heads=2, **options):
    return SuperTokenAttention(dim=dim, heads=heads, **options).double()


def tokens(grid, batch=2, dim=8):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def association(x, grid, cell, border="zero"):
    around = Around(grid, cell, 1, border)
    centres = torch.randn(x.shape[0], around.coarse.numel, x.shape[2], dtype=x.dtype)
    return Association.of(x, centres, around, "auto")


def written_out(x, centres, around):
    """Q (B, N, M), its phantom columns dropped, by unfolding the padded map of super tokens."""
    h, w = around.coarse
    padded = functional.pad(centres.transpose(1, 2).unflatten(2, (h, w)), (1, 1, 1, 1)).flatten(2)
    logits = x @ padded * x.shape[2] ** -0.5
    near = around.padded().pattern.dense()
    weights = logits.masked_fill(~near, float("-inf")).softmax(-1)
    return weights.unflatten(2, (h + 2, w + 2))[:, :, 1:-1, 1:-1].flatten(2)


@pytest.mark.parametrize("grid", [Grid(12), Grid(4, 6), Grid(2, 3, 4)])
def test_cells_of_one_token_are_full_attention(grid):
    module, x = layer(cell=1), tokens(grid)
    truth = module.proj(merge_heads(functional.scaled_dot_product_attention(*module.qkv(x))))
    torch.testing.assert_close(module(x, grid), truth)


@pytest.mark.parametrize("grid", [Grid(6, 9), Grid(5, 7)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_equals_the_association_written_out(grid, iterations):
    module, x = layer(cell=(2, 3), iterations=iterations), tokens(grid)
    around = Around(grid, (2, 3), 1, "zero")
    own = Within(grid, (2, 3), 0).dense().double()
    s = own @ x / own.sum(1, keepdim=True)
    for _ in range(iterations):
        weights = written_out(x, s, around)
        s = weights.mT @ x / weights.sum(1)[..., None]
    torch.testing.assert_close(module(x, grid), weights @ module.refine(s))


def test_rows_of_the_association_sum_to_one_with_the_phantoms():
    grid = Grid(6, 8)
    x = tokens(grid)
    q = association(x, grid, 2)
    mass = q.spread(torch.ones(2, 12, 1, dtype=torch.float64))[..., 0]
    inner = mass.unflatten(1, (6, 8))[:, 2:4, 2:6]
    torch.testing.assert_close(inner, torch.ones_like(inner))
    border = torch.ones(6, 8, dtype=torch.bool)
    border[2:4, 2:6] = False
    assert (mass[:, border.flatten()] < 1 - 1e-6).all()
    free = association(x, grid, 2, "mask").spread(torch.ones(2, 12, 1, dtype=torch.float64))
    torch.testing.assert_close(free, torch.ones_like(free))


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_the_two_ways_are_adjoint(border):
    grid = Grid(5, 8)
    x = tokens(grid)
    q = association(x, grid, 2, border)
    fine, coarse = torch.randn(2, 40, 3, dtype=x.dtype), torch.randn(2, 12, 3, dtype=x.dtype)
    torch.testing.assert_close((q.spread(coarse) * fine).sum(), (coarse * q.gather(fine)).sum())


def test_constants_stay_constant_inside_and_shrink_at_the_border():
    grid = Grid(6, 8)
    module = layer(cell=2, qkv_bias=False)
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 48, 8)
    with torch.no_grad():
        module.proj.bias.zero_()
    association_, full = module.associate(x, grid), module.refine(x[:, :1])
    torch.testing.assert_close(association_.centres[:, 0], x[:, :12])  # border cells too
    share = (module(x, grid) / full).unflatten(1, (6, 8))
    torch.testing.assert_close(share[:, 2:4, 2:6], torch.ones_like(share[:, 2:4, 2:6]))
    assert (share[:, 0] < 1 - 1e-6).all()
    module.border = "mask"
    torch.testing.assert_close(module(x, grid), full.expand(1, 48, 8))


def test_no_gradient_goes_through_the_association():
    grid, module = Grid(4, 6), layer(cell=2, iterations=2)
    x = tokens(grid, 1).requires_grad_()
    fixed = module.associate(x, grid)
    assert not any(t.requires_grad for t in fixed[:3])
    (mine,) = torch.autograd.grad(module(x, grid).square().sum(), x)
    mass = fixed.gather(torch.ones_like(x[..., :1])) + 1e-12
    held = fixed.spread(module.refine(fixed.gather(x) / mass)).square().sum()
    (theirs,) = torch.autograd.grad(held, x)
    torch.testing.assert_close(mine, theirs)


def test_the_authors_padding_takes_part_and_changes_nothing_where_cells_divide():
    ours, theirs = layer(cell=(2, 3)), layer(cell=(2, 3), official=True)
    theirs.load_state_dict(ours.state_dict())
    even, odd = tokens(Grid(4, 6)), tokens(Grid(5, 7))
    torch.testing.assert_close(ours(even, Grid(4, 6)), theirs(even, Grid(4, 6)))
    assert theirs(odd, Grid(5, 7)).shape == odd.shape
    assert not torch.allclose(ours(odd, Grid(5, 7)), theirs(odd, Grid(5, 7)))


def test_pairs_grow_linearly_with_tokens():
    for side in (16, 32, 64):
        grid, n, m = Grid(side, side), side * side, side * side // 16
        shapes = (1, 1, n, 8), (1, 1, m, 8), (1, 1, m, 8)
        look = explain(*shapes, where=Around(grid, 4, 1, "zero"), backend="tiles")
        assert look.pairs_needed == 9 * n
        assert look.pairs_computed <= 3 * look.pairs_needed
        back = explain(shapes[1], shapes[0], shapes[0], where=Within(grid, 4, 1))
        assert back.pairs_needed < 9 * n  # what phantoms take is lost


def test_low_precision_is_near():
    grid, module = Grid(6, 8), layer(cell=2)
    x = tokens(grid)
    truth = module(x, grid)
    low = module.to(torch.bfloat16)(x.bfloat16(), grid)
    assert (low.double() - truth).abs().max() < 0.1 * truth.abs().max()


def test_layer_keeps_the_shape_and_trains():
    module, grid = SuperTokenLayer(dim=8, heads=2, cell=2, mlp_ratio=2, layer_scale=0.1), Grid(4, 6)
    out = module(torch.randn(2, 24, 8), grid)
    out.square().mean().backward()
    assert out.shape == (2, 24, 8)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_attention_among_super_tokens_is_attend():
    module, s = layer(), tokens(Grid(9))
    torch.testing.assert_close(module.refine(s), module.proj(merge_heads(attend(*module.qkv(s)))))


@pytest.mark.parametrize(
    ("options", "name"),
    [({"cell": 0}, "cell"), ({"iterations": 0}, "iterations"), ({"border": "clamp"}, "border")],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)
    with pytest.raises(ArgumentError, match="cell"):
        layer(cell=(2, 2, 2))(tokens(Grid(4, 4)), Grid(4, 4))
