"""Norms that torch does not have."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype


class SimpleRMSNorm(nn.Module):
    """Divide by the root mean square, without parameters: x / (|x|_2 / sqrt(C) + eps) (arXiv 2307.14995).

    Scaling x changes nothing. `eps` is added to the root, not under it, so that rows of zeros stay zeros.

    Args:
        dim: channels C.
        eps: added to the root mean square.
    """

    def __init__(self, dim: int, *, eps: float = 1e-8):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return x of unit root mean square; computed in float32 or wider."""
        wide = x.to(accumulation_dtype(x.dtype))
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * self.dim**-0.5
        return (wide / (size + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.dim}, eps={self.eps}"


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, *spatial), every pixel by itself; the arguments of LayerNorm."""

    def forward(self, input: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Return the map with every pixel's channels normalised."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
