"""lowrank_error against both matrices written out, with gradients."""

import torch

from foveate.kernels.lowrank import lowrank_error


def test_equals_the_matrices_written_out_with_gradients_to_the_low_rank_side_alone():
    q, k = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    c = torch.randn(2, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    truth = (c @ basis - (q @ k.mT / 2).softmax(-1).detach()).square().sum()
    loss = lowrank_error(c, basis, q, k)
    torch.testing.assert_close(loss, truth)
    for a, b in zip(
        torch.autograd.grad(loss, (c, basis)), torch.autograd.grad(truth, (c, basis)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert not torch.autograd.grad(lowrank_error(c, basis, q, k), (q, k), allow_unused=True)[0]


def test_a_matrix_that_is_low_rank_is_met():
    k = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    q = torch.zeros(1, 1, 6, 4, dtype=torch.float64)  # every row is uniform
    loss = lowrank_error(torch.ones(1, 1, 6, 1).double(), torch.full((1, 6), 1 / 6).double(), q, k)
    torch.testing.assert_close(loss, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
