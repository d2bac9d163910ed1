"""Linearised relative position encoding of queries and keys, done before `scan` (TMLR 2023, xoLyps2qWc).

Rotary encoding turns pairs of channels; here every channel is a pair of its own, with an imaginary part of 0, so
that the feature dimension doubles and each channel's product fades with the cosine of the distance.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad


def lrpe(
    x: Float[Tensor, "*batch n d"],
    theta: Float[Tensor, "*#batch #n d"],
    positions: Num[Tensor, "n"] | None = None,
) -> Float[Tensor, "*batch n 2d"]:
    """Return [x cos(theta t), x sin(theta t)] for positions t: q_t . k_s becomes sum_j q_j k_j cos(theta_j (t - s)).

    Args:
        x: queries or keys (B, H, N, D) or any leading dimensions.
        theta: angle per step of every channel, broadcast to x; usually (H, 1, D). It may carry gradients.
        positions: (N,); None counts from 0.

    Raises:
        ArgumentError: naming `theta` or `positions`.
    """
    n, d = x.shape[-2:]
    if theta.shape[-1] != d:
        raise bad("theta", tuple(theta.shape), f"{d} channels, as x {tuple(x.shape)} has")
    if positions is None:
        positions = torch.arange(n, device=x.device)
    if tuple(positions.shape) != (n,):
        raise bad("positions", tuple(positions.shape), f"({n},), one per token of x")
    wide = accumulation_dtype(x.dtype)
    angles = theta.to(wide) * positions.to(wide).unsqueeze(-1)
    return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)


def lrpe_angles(heads: int, width: int, base: float = 10000.0) -> Float[Tensor, "h 1 d"]:
    """Return the published first angles (H, 1, D): base^(-2 i / (H D)), i counted through all heads' channels."""
    return (base ** (torch.arange(heads * width) * (-2.0 / (heads * width)))).view(heads, 1, width)
