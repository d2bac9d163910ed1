"""Terminator's layer and operators: what their equations promise."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.gated.terminator_hyperzzw import (
    ChannelInteract,
    Interact,
    LocalBranch,
    RecursiveGate,
    TerminatorLayer,
    hyper_global,
    standard,
)
from foveate.mechanisms.magnet import ContextMagnet, Magnet


def layer(**options):
    module = TerminatorLayer(dim=4, size=6, **{"hidden": (5,) * 5, **options}).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def image(batch=2, dim=4, size=6):
    return torch.randn(batch, dim, size, size, dtype=torch.float64)


def test_global_operator_is_a_product_of_matrices_per_channel():
    x, kernel, fast = image(), image(1), image()
    rows = torch.stack(
        [torch.stack([(x[b, c] * kernel[0, c]) @ fast[b, c] for c in range(4)]) for b in range(2)]
    )
    torch.testing.assert_close(hyper_global(x, kernel, fast), rows)
    uniform = torch.full_like(kernel, 1 / 6)
    torch.testing.assert_close(hyper_global(x, uniform, x), (x / 6) @ x)
    assert not hyper_global(torch.zeros_like(x), kernel, fast).any()


def test_slow_network_equals_its_equations():
    net = Magnet(sizes=(3, 5), hidden=4, out=2, layers=2).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    kernel = net()
    assert kernel.shape == (1, 2, 3, 5)
    for i in range(3):
        for j in range(5):
            p = torch.tensor([i - 1.0, j / 2 - 1], dtype=torch.float64)

            def dense(conv, z):
                return conv.weight[:, :, 0, 0] @ z + conv.bias

            o = dense(net.filters[0], p).sin()
            for step, linear in enumerate(net.linears):
                o = dense(net.filters[step + 1], p).sin() * dense(linear, o) + net.bias[0, 0, i, j]
            torch.testing.assert_close(kernel[0, :, i, j], dense(net.output_linear, o))


def test_frequencies_at_the_start_grow_with_omega_and_kernels_keep_their_norm():
    torch.manual_seed(3)
    slow = Magnet(sizes=(8, 8), hidden=64, out=3, omega=0.5)
    torch.manual_seed(3)
    fast = Magnet(sizes=(8, 8), hidden=64, out=3, omega=2.0)
    torch.testing.assert_close(fast.filters[0].weight, 4 * slow.filters[0].weight)
    assert not slow.filters[0].bias.any()
    small, large = (Magnet(sizes=(n, n), hidden=64, out=64)().square().sum((2, 3)).mean() for n in (4, 32))
    assert 0.3 < small / large < 3  # whatever the size


def test_kernels_of_maps_do_not_depend_on_them_and_local_ones_do():
    module = layer()
    assert torch.equal(module.kernel(), module.kernel())
    net = ContextMagnet(size=3, context=4, hidden=5, out=4).double()
    x = image(3)
    assert net(x).shape == (1, 4, 3, 3)
    assert not torch.allclose(net(x), net(x + 1))
    # Only through the mean over the batch of what was pooled.
    mean = torch.nn.functional.adaptive_avg_pool2d(x, 3).mean(0, keepdim=True)
    torch.testing.assert_close(net(x), net(mean))


def test_a_sample_depends_on_its_batch():
    module, x = layer().eval(), image(3)
    assert not torch.allclose(module(x)[:1], module(x[:1]))


def test_official_keeps_part_of_the_gradient_back_but_not_of_the_value():
    ours = ContextMagnet(size=3, context=4, hidden=5, out=4).double()
    theirs = ContextMagnet(size=3, context=4, hidden=5, out=4, official=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = image()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    (a,), (b,) = (torch.autograd.grad(net(x).sum(), [net.filters[0].weight]) for net in (ours, theirs))
    assert not torch.allclose(a, b, rtol=1e-2)


def test_a_delta_kernel_makes_a_local_branch_pointwise():
    branch, x = LocalBranch(dim=4, kernel=3, hidden=5).double(), image()

    class Delta(nn.Module):
        def forward(self, context):
            kernel = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
            kernel[..., 1, 1] = 1
            return kernel

    branch.kernel = Delta()
    y = conv2d(x, branch.mix.weight)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(branch(image(), x), gelu(y) + branch.bias)


def test_norms_leave_channels_with_mean_zero():
    x = standard(image() * 3 + 2)
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(
        x.var((2, 3), unbiased=False), torch.ones(2, 4, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_scaling_channels_before_their_norm_changes_next_to_nothing():
    pick, x = ChannelInteract(dim=4, hidden=5).double(), image() + 2
    nn.init.normal_(pick.channels.output_linear.weight, std=0.3)
    scaled = pick(x)
    assert not torch.allclose(scaled, x / 2, rtol=5e-2)
    torch.testing.assert_close(standard(scaled), standard(x), rtol=5e-3, atol=5e-3)
    ours, theirs = layer(), layer(official=True)
    theirs.load_state_dict(ours.state_dict())
    grads = []
    for module in (ours, theirs):
        module(image()).square().sum().backward()
        grads.append(module.picker.channels.output_linear.weight.grad.abs().max())
    assert grads[0] > 100 * grads[1]


def test_gates_equal_their_equations():
    gate, x, y = Interact(dim=4, size=6, hidden=5, space_hidden=3).double(), image(), image()
    m, s = y.mean((2, 3)), y.mean(1, keepdim=True)
    score = (m * gate.channels()[0] * m)[..., None, None] * (s * gate.space() * s)
    torch.testing.assert_close(gate(y, x), x * score.sigmoid())
    torch.testing.assert_close(gate(y), y * score.sigmoid())
    unit = RecursiveGate(dim=4, size=6).double()
    v = conv2d(x, unit.v.weight, unit.v.bias)
    inner = standard(conv2d(x, unit.k.weight, unit.k.bias) * conv2d(v, unit.q.weight, unit.q.bias))
    torch.testing.assert_close(unit(x), conv2d(gelu(inner) + unit.bias, unit.y.weight))


def test_earlier_maps_join_with_their_channels_repeated():
    module, x, before, first = layer(previous=2, out=7), image(), image(dim=2), image(dim=1)
    out = module(x, before, first)
    assert out.shape == (2, 7, 6, 6)
    alone = layer(out=7)
    own = {n: p for n, p in module.state_dict().items() if n != "join.weight"}
    columns = [*range(8), *range(12, 40), *range(44, 48)]
    alone.load_state_dict({**own, "join.weight": module.join.weight[:, columns]})
    weight = module.join.weight
    joined = conv2d(before.repeat(1, 2, 1, 1), weight[:, 8:12]) + conv2d(
        first.repeat(1, 4, 1, 1), weight[:, 40:44]
    )
    torch.testing.assert_close(out, alone(x) + joined)
    with pytest.raises(ArgumentError, match=r"^previous"):
        module(x, before)


def test_cost_grows_with_the_third_power_of_the_side():
    counts = {}
    for size in (8, 16, 32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = torch.randn(1, 4, size, size)
            hyper_global(x, torch.ones(1, 4, size, size), x)
        counts[size] = counter.get_total_flops()
    assert counts[32] == 8 * counts[16] == 64 * counts[8] == 2 * 4 * 32**3


def test_it_learns():
    torch.manual_seed(0)
    module = TerminatorLayer(dim=4, size=6, hidden=(8,) * 5)
    x = torch.randn(16, 4, 6, 6)
    target = x.transpose(2, 3)  # every pixel needs one far away
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85  # less than the target's variance, 1
    assert math.isfinite(losses[-1])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": 1}, "size"),
        ({"hidden": (4, 4)}, "hidden"),
        ({"hidden": (0,) * 5}, "hidden"),
        ({"layers": (2, 2)}, "layers"),
        ({"kernels": (3, 3, 3)}, "kernels"),
        ({"kernels": (3, 4, 3, 3)}, "kernels"),
        ({"previous": 3}, "previous"),
        ({"out": 0}, "out"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        TerminatorLayer(**{"dim": 4, "size": 6, "hidden": (4,) * 5, **options})


@pytest.mark.parametrize("grid", [Grid(6), Grid(6, 8), Grid(1, 1)])
def test_only_square_maps(grid):
    with pytest.raises(ArgumentError, match=r"^grid"):
        TerminatorLayer.for_workload(dim=4, grid=grid, heads=2)
    with pytest.raises(ArgumentError, match=r"^x"):
        layer()(torch.randn(1, 4, 5, 6, dtype=torch.float64))
