"""Losses of a part of a network that ride along with its output, so that any training loop trains the part."""

import torch
from jaxtyping import Float
from torch import Tensor


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device, loss.shape
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device, shape = ctx.like
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def with_loss(out: Float[Tensor, "*any"], loss: Float[Tensor, ""]) -> Float[Tensor, "*any"]:
    """Return `out` unchanged; whoever calls backward through it also gets the gradient of `loss`.

    The loss counts with weight 1 whatever the gradient of `out` is (scaling of a loss, as for float16, does not
    reach it). It must not be added to the objective again.
    """
    return _Ride.apply(out, loss)  # type: ignore[return-value]
