import math

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.scores.rotary import axial_angles, axial_rotary, rotary, rotate


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_equals_a_loop_over_pairs(style):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    got = rotary(x, style=style, base=100.0)
    for n in range(5):
        for i in range(3):
            a, b = (i, i + 3) if style == "half" else (2 * i, 2 * i + 1)
            angle = n * 100.0 ** (-2 * i / 6)
            turn = complex(math.cos(angle), math.sin(angle))
            for h in range(2):
                z = complex(x[0, h, n, a], x[0, h, n, b]) * turn
                assert abs(z - complex(got[0, h, n, a], got[0, h, n, b])) < 1e-12


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_products_depend_on_the_distance_only(style):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda p, x: rotary(x, torch.tensor([p]), style=style)  # noqa: E731
    torch.testing.assert_close((at(3, q) * at(5, k)).sum(), (at(13.0, q) * at(15.0, k)).sum())
    torch.testing.assert_close(at(7, q).norm(), q.norm())


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(2, 4, 8)
    y = rotary(x, dims=4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    torch.testing.assert_close(y[..., :4], rotary(x[..., :4]))


def test_free_positions_per_head_and_token():
    x, p = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4)
    y = rotary(x, p)
    torch.testing.assert_close(y[1, 2, 3], rotary(x[1, 2, 3][None], p[1, 2, 3:4])[0])


def test_axial_rotates_one_block_per_axis():
    x, grid = torch.randn(1, 2, 6, 8), Grid(2, 3)
    y = axial_rotary(x, grid)
    torch.testing.assert_close(y[..., :4], rotary(x[..., :4], torch.arange(6) // 3))
    torch.testing.assert_close(y[..., 4:], rotary(x[..., 4:], torch.arange(6) % 3))


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_axial_angles_turn_as_axial_rotary_does(style):
    x, grid = torch.randn(1, 2, 12, 12, dtype=torch.float64), Grid(2, 3, 2)
    angles = axial_angles(grid, 12, dtype=torch.float64)
    turned = rotate(x[..., :4], angles[:, :2].cos(), angles[:, :2].sin(), style)
    torch.testing.assert_close(turned, axial_rotary(x, grid, style=style)[..., :4])
    if style == "interleaved":  # neighbouring pairs need no blocks
        torch.testing.assert_close(
            rotate(x, angles.cos(), angles.sin(), style), axial_rotary(x, grid, style=style)
        )


def test_inclusive_frequencies_end_at_one_over_base():
    angles = axial_angles(Grid(1, 2), 12, inclusive=True, dtype=torch.float64)
    torch.testing.assert_close(angles[1], torch.tensor([0, 0, 0, 1, 0.01, 1e-4], dtype=torch.float64))
    torch.testing.assert_close(
        axial_angles(Grid(3, 1), 4, inclusive=True), torch.arange(3.0)[:, None] * torch.tensor([1.0, 0.0])
    )


def test_angles_are_float32_for_half_precision():
    x = torch.randn(1, 1, 4096, 4)
    exact = rotary(x.double())
    err = (rotary(x.bfloat16()).double() - exact).abs().max()
    assert err < 0.05  # bf16 angles at position 4095 would err by several radians


def test_bad_arguments_are_named():
    x = torch.randn(1, 2, 4, 6)
    for options, name in (
        ({"dims": 3}, "dims"),
        ({"dims": 8}, "dims"),
        ({"style": "gptj"}, "style"),
        ({"base": 0.0}, "base"),
        ({"positions": torch.arange(5)}, "positions"),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}"):
            rotary(x, **options)
    with pytest.raises(ArgumentError, match=r"^x"):
        axial_rotary(x, Grid(2, 2))
    with pytest.raises(ArgumentError, match=r"^x"):
        axial_rotary(torch.randn(1, 2, 4, 8), Grid(2, 3))
    with pytest.raises(ArgumentError, match=r"^d:"):
        axial_angles(Grid(2, 2), 6)
