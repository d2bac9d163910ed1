"""Decay along paths with one corner: against a walk cell by cell, and the fast product against the N x N one."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.kernels.paths import path_linear_attention, path_product
from foveate.patterns.grids import Windows
from foveate.scores.base import Chain
from foveate.scores.distance import DistanceDecay
from foveate.scores.pairs import Pairs
from foveate.scores.paths import column_decay, line_sums, path_decay, row_decay
from tests.scores.blocks import B, H, dense_and_cells, gradients

GRID = Grid(3, 4)


def decays(grid=GRID, dtype=torch.float64, b=B, h=H):
    return -torch.rand(b, h, grid.numel, dtype=dtype), -torch.rand(b, h, grid.numel, dtype=dtype)


def score(across, down, grid=GRID, first="row") -> Chain:
    return path_decay(line_sums(across, grid, 1), line_sums(down, grid, 0), grid, first=first)


def matrix(across, down, grid=GRID, first="row"):
    n = grid.numel
    return score(across, down, grid, first).apply(across.new_zeros(*across.shape, n), Pairs.full(n, n))


def walk(across, down, grid, q, k, first):
    """Multiply factors step by step, as a traveller would who pays at the later cell of each step."""
    (y, x), (to_y, to_x) = divmod(q, grid[1]), divmod(k, grid[1])
    factor = 1.0

    def along_row():
        nonlocal x, factor
        while x != to_x:
            step = 1 if to_x > x else -1
            factor *= float(across[y * grid[1] + max(x, x + step)].exp())
            x += step

    def along_column():
        nonlocal y, factor
        while y != to_y:
            step = 1 if to_y > y else -1
            factor *= float(down[max(y, y + step) * grid[1] + x].exp())
            y += step

    for stretch in (along_row, along_column) if first == "row" else (along_column, along_row):
        stretch()
    return factor


@pytest.mark.parametrize("first", ["row", "column"])
@pytest.mark.parametrize("grid", [GRID, Grid(4, 2), Grid(1, 5), Grid(5, 1), Grid(1, 1)], ids=str)
def test_equals_a_walk_for_every_pair(grid, first):
    across, down = decays(grid)
    got = matrix(across, down, grid, first).exp()
    for q in range(grid.numel):
        for k in range(grid.numel):
            want = walk(across[1, 2], down[1, 2], grid, q, k, first)
            assert float(got[1, 2, q, k]) == pytest.approx(want, rel=1e-12), (q, k)


def test_the_other_corner_is_the_transpose_and_the_diagonal_is_free():
    across, down = decays()
    one, two = (matrix(across, down, first=first) for first in ("row", "column"))
    torch.testing.assert_close(one.mT, two)
    assert not torch.allclose(one, two)
    assert one.diagonal(dim1=-2, dim2=-1).eq(0).all()


def test_constant_factors_are_manhattan_decay():
    rate = torch.rand(H, dtype=torch.float64)
    constant = -rate[None, :, None].expand(1, H, GRID.numel)
    want = DistanceDecay(rate, GRID).values(Pairs.full(12, 12))
    for first in ("row", "column"):
        torch.testing.assert_close(matrix(constant, constant, first=first), want)


def test_one_line_has_one_path():
    for grid in (Grid(1, 6), Grid(6, 1)):
        across, down = decays(grid)
        torch.testing.assert_close(matrix(across, down, grid), matrix(across, down, grid, "column"))


@pytest.mark.parametrize("per_head", [False, True])
def test_cells_equal_dense(per_head):
    across, down = decays()
    for first in ("row", "column"):
        want, got = dense_and_cells(score(across, down, first=first), 12, 12, per_head=per_head)
        torch.testing.assert_close(want, got, rtol=0, atol=1e-14)


@pytest.mark.parametrize("first", ["row", "column"])
def test_gradients(first):
    grid = Grid(2, 2)
    across, down = decays(grid, b=1, h=2)
    assert gradients(lambda a, d: {"score": score(a, d, grid, first)}, across, down, n_q=4, n_k=4)
    # Where nothing decays the gradient is that of the sums, not that of an absolute value.
    still = torch.zeros(1, 1, 3, requires_grad=True)
    line_sums(still, Grid(1, 3), 1)[0, 0, 0, 2].backward()
    assert still.grad.tolist() == [[[0.0, 1.0, 1.0]]]


@pytest.mark.skipif(absent() is not None, reason="the C++ core is not built")
def test_the_core_knows_them():
    grid = Grid(8, 8)
    across, down = decays(grid, torch.float32)
    q, k, v = torch.randn(3, B, H, 64, 16).unbind()
    for where, part in (
        (None, score(across, down, grid)),
        (Windows(grid, (1, 8)), row_decay(line_sums(across, grid, 1), grid)),
        (Windows(grid, (8, 1)), column_decay(line_sums(down, grid, 0), grid)),
    ):
        fast = attend(q, k, v, where=where, score=part, backend="cpu")
        torch.testing.assert_close(fast, attend(q, k, v, where=where, score=part, backend="reference"))


@pytest.mark.parametrize("first", ["row", "column"])
@pytest.mark.parametrize("grid", [GRID, Grid(7, 5), Grid(1, 6), Grid(6, 1), Grid(1, 1)], ids=str)
def test_the_fast_product_equals_the_explicit_one(grid, first):
    across, down = decays(grid)
    x = torch.randn(B, H, grid.numel, 2, dtype=torch.float64)
    want = matrix(across, down, grid, first).exp() @ x
    torch.testing.assert_close(path_product(x, across, down, grid, first=first), want)


def test_the_fast_product_keeps_single_precision_on_a_large_grid():
    grid = Grid(40, 30)
    across, down = (-torch.rand(1, 1, grid.numel) * 0.1 for _ in range(2))
    x = torch.randn(1, 1, grid.numel, 3)
    truth = matrix(across.double(), down.double(), grid).exp() @ x.double()
    got = path_product(x, across, down, grid)
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("first", ["row", "column"])
def test_linear_attention_equals_masked_products_with_gradients(first):
    across, down = decays()
    q, k, v = (torch.randn(B, H, 12, e, dtype=torch.float64, requires_grad=True) for e in (3, 3, 5))
    across, down = across.requires_grad_(), down.requires_grad_()
    fast = path_linear_attention(q, k, v, across, down, GRID, first=first, scale=0.5)
    slow = (matrix(across, down, first=first).exp() * (q @ k.mT) * 0.5) @ v
    torch.testing.assert_close(fast, slow)
    cotangent = torch.randn_like(fast)
    leaves = (q, k, v, across, down)
    for a, b in zip(
        torch.autograd.grad((fast * cotangent).sum(), leaves),
        torch.autograd.grad((slow * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_refusals_name_the_argument():
    across, down = decays()
    with pytest.raises(ArgumentError, match="grid"):
        line_sums(across, Grid(12), 1)
    with pytest.raises(ArgumentError, match="log_decay"):
        line_sums(across[..., :5], GRID, 1)
    with pytest.raises(ArgumentError, match="axis"):
        line_sums(across, GRID, 2)
    with pytest.raises(ArgumentError, match="first"):
        score(across, down, first="diagonal")
    x = torch.randn(B, H, 12, 2, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="first"):
        path_product(x, across, down, GRID, first="diagonal")
    with pytest.raises(ArgumentError, match="x"):
        path_product(x[:, :1], across, down, GRID)
