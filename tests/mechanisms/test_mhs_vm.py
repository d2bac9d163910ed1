"""MHS-VM: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.linear.mhs_vm import FAMILIES, MHSVM, MultiHeadScan, family, fuse
from foveate.mechanisms.state_space import SelectiveSSM

GRID = Grid(4, 5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 6), Grid(5, 1), Grid(3, 4), Grid(6, 3)])
def test_every_route_visits_every_cell_once(name, grid):
    routes = family(name, grid)
    for route in routes:
        assert torch.equal(route.order.sort().values, torch.arange(grid.numel))
    assert (routes[1], routes[3]) == (routes[0].reversed(), routes[2].reversed())


def test_the_second_route_of_a_family_is_another_view_of_the_first():
    grid = Grid(4, 4)
    ids = torch.arange(16).view(4, 4)
    for name, view in (
        ("snake", ids.T),
        ("raster", ids.T),
        ("diagonal", ids.flip(1)),
        ("spiral", ids.flip(0)),
    ):
        first, _, second, _ = family(name, grid)
        assert torch.equal(second.order, view.flatten()[first.order])


def test_directions_that_agree_say_nothing():
    y = torch.randn(2, 3, 1, 7, 4).expand(-1, -1, 4, -1, -1)
    assert not fuse(y).any()
    assert not fuse(torch.randn(2, 3, 4, 7, 4), threshold=10.0).any()


def test_fusion_scales_with_its_readings():
    y = torch.randn(2, 3, 4, 7, 4, dtype=torch.float64) * 100
    torch.testing.assert_close(fuse(2 * y), 2 * fuse(y), rtol=1e-5, atol=1e-5)


def test_fusion_is_the_sum_weighed_by_the_coefficient_of_variation():
    y = torch.tensor([1.0, 2.0, 4.0, 9.0]).view(1, 1, 4, 1, 1)
    spread = (((y - 4) ** 2).sum() / 3).sqrt()
    expected = 16 * (spread / (3 + 1e-5) - 0.25)
    torch.testing.assert_close(fuse(y, 0.25).squeeze(), expected)


def test_heads_do_not_hear_each_other():
    module = MultiHeadScan(dim=8, routes=("snake", "raster"), states=2, project=False).double()
    with torch.no_grad():
        module.subspaces.weight.copy_(torch.eye(8))
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    changed = x.clone()
    changed[..., :4] += 1
    before, after = module(x, GRID), module(changed, GRID)
    assert not torch.allclose(before[..., :4], after[..., :4])
    assert torch.equal(before[..., 4:], after[..., 4:])


def test_a_head_is_four_plain_scans_along_its_routes():
    module = MultiHeadScan(dim=4, routes=("spiral",), states=3, project=False).double()
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    u = module.subspaces(x)
    readings = []
    for k, route in enumerate(family("spiral", GRID)):
        alone = SelectiveSSM(groups=1, channels=4, states=3).double()
        for name, parameter in alone.named_parameters():
            parameter.data.copy_(getattr(module.ssm, name)[k : k + 1])
        readings.append(alone(u[:, None, route.order])[:, 0, route.inverse])
    torch.testing.assert_close(module(x, GRID), fuse(torch.stack(readings, 1)[:, None])[:, 0])


def test_without_reading_the_state_every_pixel_stands_alone():
    module = MultiHeadScan(dim=8, routes=FAMILIES, states=2, project=False).double()
    with torch.no_grad():
        module.ssm.x_proj[:, -2:] = 0  # C = 0, and only D u is left
        module.ssm.D.copy_(torch.rand_like(module.ssm.D))
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1
    moved = (module(changed, GRID) - module(x, GRID)).abs().sum(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [7]


def test_every_pixel_hears_of_every_other():
    module = MHSVM(dim=8, routes=("spiral", "diagonal"), states=2).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x, GRID)[0, 3].square().sum(), x)
    assert bool((grad.abs().sum(-1) > 0).all())


def test_the_ungated_layer_has_neither_input_projection_nor_gate():
    gated, plain = MHSVM(dim=8, states=2), MHSVM(dim=8, states=2, gated=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (gated, plain)]
    assert count[0] - count[1] == 2 * 8 * 8
    x = torch.randn(1, 20, 8)
    u = torch.nn.functional.silu(plain.conv(x.mT.unflatten(2, GRID.sizes))).flatten(2).mT
    torch.testing.assert_close(plain(x, GRID), plain.norm(plain.scan(u, GRID)))


def test_channels_that_no_head_gets_come_back_with_the_projection():
    module = MultiHeadScan(dim=8, routes=FAMILIES[:3], states=2)
    assert module.subspaces.out_features == 6
    assert module(torch.randn(1, 20, 8), GRID).shape == (1, 20, 8)
    with pytest.raises(ArgumentError, match=r"^dim: expected a multiple of the 3 routes"):
        MultiHeadScan(dim=8, routes=FAMILIES[:3], project=False)


def test_bfloat16_scans_in_float32():
    module = MHSVM(dim=8, states=2).eval()
    x = torch.randn(1, 20, 8)
    exact = module.double()(x.double(), GRID)
    rough = module.bfloat16()(x.bfloat16(), GRID)
    assert rough.dtype == torch.bfloat16
    # The fusion subtracts nearly equal readings, so a rounded input shows more than elsewhere.
    assert (rough.double() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_parameters_grow_with_the_channels_and_states_only():
    for heads in (1, 2, 4):
        ssm = MultiHeadScan(dim=64, routes=FAMILIES[:heads], states=16).ssm
        width, rank = 64 // heads, -(-64 // heads // 16)
        each = (rank + 32) * width + width * rank + width + 16 * width + width
        assert sum(p.numel() for p in ssm.parameters()) == 4 * heads * each


def test_the_state_space_layer_starts_as_mamba_does():
    ssm = SelectiveSSM(groups=2, channels=32, states=4)
    torch.testing.assert_close(-ssm.A_log.exp()[0, 0], torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    dt = torch.nn.functional.softplus(ssm.dt_bias)
    assert bool((dt >= 0.999e-3).all())
    assert bool((dt <= 0.1001).all())
    assert ssm.rank == 2
    assert "states=4" in ssm.extra_repr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MHSVM(dim=8, routes=("hilbert",)), "^routes: expected a family"),
        (lambda: MHSVM(dim=8, routes=()), "^routes: expected at least one"),
        (lambda: MHSVM(dim=8, conv=4), "^conv: expected an odd"),
        (lambda: SelectiveSSM(groups=1, channels=4, states=0), "^states: expected"),
        (lambda: SelectiveSSM(groups=1, channels=4)(torch.randn(1, 2, 5, 4)), "^u: expected"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
