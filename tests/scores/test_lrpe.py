"""lrpe: products that depend on distances only, and gradients of the angles."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.scores.lrpe import lrpe, lrpe_angles


def test_products_fade_with_the_cosine_of_the_distance():
    q, k = torch.randn(2, 3, 9, 4).double(), torch.randn(2, 3, 9, 4).double()
    theta = torch.rand(3, 1, 4).double()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    phase = (theta.unsqueeze(1) * distance[None, :, :, None]).cos()
    expected = (q.unsqueeze(3) * k.unsqueeze(2) * phase).sum(-1)
    torch.testing.assert_close(lrpe(q, theta) @ lrpe(k, theta).mT, expected)
    shifted = torch.arange(9) + 1000
    torch.testing.assert_close(lrpe(q, theta, shifted) @ lrpe(k, theta, shifted).mT, expected)


def test_angles_of_zero_change_nothing_but_the_width():
    x = torch.randn(1, 2, 5, 4)
    assert torch.equal(lrpe(x, torch.zeros(2, 1, 4)), torch.cat([x, torch.zeros_like(x)], -1))
    assert lrpe(x.bfloat16(), torch.rand(2, 1, 4)).dtype == torch.bfloat16


def test_angles_have_gradients():
    x, theta = torch.randn(1, 2, 5, 4).double(), lrpe_angles(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: lrpe(x, t), (theta,))


@pytest.mark.parametrize(
    ("theta", "positions", "name"),
    [(torch.zeros(2, 1, 3), None, "theta"), (torch.zeros(2, 1, 4), torch.arange(4), "positions")],
)
def test_what_does_not_fit_is_named(theta, positions, name):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        lrpe(torch.randn(1, 2, 5, 4), theta, positions)
