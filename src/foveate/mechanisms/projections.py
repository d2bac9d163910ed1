"""Shared projections: tokens to queries, keys and values per head, and back."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.mechanisms.inputs import check_heads


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b h n d"]:
    """Cut the channels into heads: head `h` owns channels `h*d .. h*d + d - 1`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n hd"]:
    """Put the heads back side by side; the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


class QKV(nn.Linear):
    """One linear map to queries, keys and values: rows of `weight` are all q, then all k, then all v.

    Args:
        dim: channels, `heads` times the head width.
        heads: number of heads.
        bias: whether the map has one.
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = True):
        check_heads(dim, heads)
        super().__init__(dim, 3 * dim, bias=bias)
        self.heads = heads

    def forward(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Return q, k, v, each (B, H, N, D)."""
        q, k, v = torch.chunk(super().forward(x), 3, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def extra_repr(self) -> str:
        """Show the heads beside what a Linear shows."""
        return f"{super().extra_repr()}, heads={self.heads}"
