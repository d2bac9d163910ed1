"""VAN: every 'works when' statement about its attention, as a test."""

import math

import pytest
import torch
from torch.nn.functional import conv2d

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.gated.van import LargeKernelAttention, VANAttention


def randomised(module):
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def set_conv(conv, **values):
    for name, value in values.items():
        torch.nn.init.constant_(getattr(conv, name), value)


def support(module, size, channels):
    """Which pixels of a size x size map the middle of the output depends on, (size, size) bool."""
    x = torch.randn(1, channels, size, size, dtype=torch.float64, requires_grad=True)
    out = module(x)[0, :, size // 2, size // 2].sum()
    return torch.autograd.grad(out, x)[0][0].abs().amax(0) > 0


def square(size, reach):
    expected = torch.zeros(size, size, dtype=torch.bool)
    middle = slice(size // 2 - reach, size // 2 + reach + 1)
    expected[middle, middle] = True
    return expected


def test_mixing_with_weight_zero_and_bias_one_is_the_identity():
    gate = randomised(LargeKernelAttention(dim=4))
    set_conv(gate.mix, weight=0.0, bias=1.0)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    assert torch.equal(gate(x), x)


@pytest.mark.parametrize("made", [LargeKernelAttention, VANAttention])
def test_the_published_field_is_23_wide_and_full(made):
    assert torch.equal(support(randomised(made(dim=3)), 29, 3), square(29, 11))


@pytest.mark.parametrize(
    ("kernel", "dilation", "local", "taps", "reach"),
    [
        (21, 3, 5, 7, 11),
        (7, 2, 3, 4, 4),
        (14, 3, 5, 5, 8),
        (28, 4, 7, 7, 15),
        (5, 1, 1, 5, 2),
        (3, 3, 5, 1, 2),
    ],
)
def test_the_decomposition(kernel, dilation, local, taps, reach):
    gate = randomised(LargeKernelAttention(dim=2, kernel=kernel, dilation=dilation))
    assert gate.local.weight.shape == (2, 1, local, local)
    assert gate.dilated.weight.shape == (2, 1, taps, taps)
    assert gate.dilated.dilation == (dilation, dilation)
    assert gate.reach == reach
    size = 2 * reach + 5
    assert torch.equal(support(gate, size, 2), square(size, reach))


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 5), (24, 23)])
def test_any_size(size):
    x = torch.randn(2, 4, *size)
    assert LargeKernelAttention(dim=4)(x).shape == x.shape
    y = VANAttention(dim=4)(x)
    assert y.shape == x.shape
    assert y.isfinite().all()


def test_the_three_convolutions_are_one_dense_one():
    """Away from the border the map is one convolution, whose kernel is the response to an impulse."""
    gate = randomised(LargeKernelAttention(dim=2))
    with torch.no_grad():
        for conv in (gate.local, gate.dilated, gate.mix):
            set_conv(conv, bias=0.0)
        impulse = torch.zeros(2, 2, 23, 23, dtype=torch.float64)
        impulse[0, 0, 11, 11] = impulse[1, 1, 11, 11] = 1
        response = gate.mix(gate.dilated(gate.local(impulse)))
    x = torch.randn(1, 2, 31, 31, dtype=torch.float64)
    inside = (..., slice(11, -11), slice(11, -11))
    dense = x[inside] * conv2d(x, response.transpose(0, 1).flip(2, 3))
    torch.testing.assert_close(gate(x)[inside], dense)


def test_the_gate_is_not_squashed():
    gate = LargeKernelAttention(dim=2)
    for value in (-2.0, 5.0):
        set_conv(gate.mix, weight=0.0, bias=value)
        x = torch.randn(1, 2, 4, 4)
        torch.testing.assert_close(gate(x), value * x)


def test_the_residual_is_inside():
    module = randomised(VANAttention(dim=4))
    set_conv(module.proj_out, weight=0.0, bias=0.0)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(module(x), x)


def test_parameters_per_channel():
    dim = 8
    gate = LargeKernelAttention(dim=dim)
    assert sum(p.numel() for p in gate.parameters() if p.dim() > 1) == dim * (25 + 49 + dim)
    assert sum(p.numel() for p in gate.parameters() if p.dim() == 1) == 3 * dim


def test_initial_weights():
    module = VANAttention(dim=256)
    for conv, fan_out in (
        (module.gate.local, 25),
        (module.gate.dilated, 49),
        (module.gate.mix, 256),
        (module.proj_in, 256),
        (module.proj_out, 256),
    ):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert not dict(conv.named_parameters())["bias"].any()


def test_wrong_options_and_inputs_are_named():
    with pytest.raises(ArgumentError, match=r"^kernel:.*kernel=15 is one"):
        VANAttention(dim=4, kernel=12, dilation=3)
    LargeKernelAttention(dim=4, kernel=15, dilation=3)
    for options, name in (
        ({"dim": 0}, "dim"),
        ({"dim": 4, "kernel": 0}, "kernel"),
        ({"dim": 4, "dilation": 1.5}, "dilation"),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}:"):
            VANAttention(**options)
    with pytest.raises(ArgumentError, match=r"^x:"):
        LargeKernelAttention(dim=4)(torch.randn(1, 3, 5, 5))
    with pytest.raises(ArgumentError, match=r"^x:"):
        VANAttention(dim=4)(torch.randn(1, 4, 5))
    with pytest.raises(ArgumentError, match=r"^grid:"):
        VANAttention.for_workload(dim=4, grid=Grid(64), heads=2)
