"""A loss that rides along."""

import torch

from foveate.mechanisms.auxiliary import with_loss


def test_the_output_is_unchanged_and_both_get_their_gradients():
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(5, requires_grad=True)
    out = with_loss(2 * x, w.square().sum())
    assert out.equal(2 * x)
    (out * 7).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(14).all()
    assert w.grad is not None
    assert w.grad.equal(2 * w.detach())
