"""The wrappers that let token mechanisms and spatial modules take each other's place."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.layout import as_spatial, as_tokens


class RowSum(nn.Module):
    """A token mechanism that knows its grid: adds the mean over the last grid axis."""

    def forward(self, x, grid):
        y = x.unflatten(1, grid.sizes)
        return (y + y.mean(grid.ndim, keepdim=True)).flatten(1, grid.ndim)


@pytest.mark.parametrize("sizes", [(6,), (3, 4), (2, 3, 4)])
def test_token_mechanism_in_a_spatial_place(sizes):
    x = torch.randn(2, 5, *sizes)
    torch.testing.assert_close(as_spatial(RowSum())(x), x + x.mean(-1, keepdim=True))


@pytest.mark.parametrize("sizes", [(6,), (3, 4), (2, 3, 4)])
def test_spatial_module_in_a_token_place(sizes):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1](5, 5, 3, padding=1)
    x = torch.randn(2, 5, *sizes)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(as_tokens(conv)(tokens, Grid(*sizes)), conv(x).flatten(2).transpose(1, 2))


def test_wrapping_twice_unwraps():
    inner = RowSum()
    assert as_tokens(as_spatial(inner)) is inner
    assert as_spatial(as_tokens(inner)) is inner


def test_parameters_stay_reachable():
    conv = nn.Conv2d(3, 3, 1)
    assert {n for n, _ in as_tokens(conv).named_parameters()} == {"inner.weight", "inner.bias"}


def test_wrong_shapes_are_named():
    with pytest.raises(ArgumentError, match="x: expected 12 tokens"):
        as_tokens(nn.Identity())(torch.randn(1, 11, 3), Grid(3, 4))
    with pytest.raises(ArgumentError, match="x: expected three axes"):
        as_tokens(nn.Identity())(torch.randn(11, 3), Grid(11))
    with pytest.raises(ArgumentError, match=r"x: expected .* spatial axes"):
        as_spatial(RowSum())(torch.randn(4, 3))
