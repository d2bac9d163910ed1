"""Content clusters: centroids on a sphere, learned online, and the top queries and keys of each."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad


def on_sphere(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return the layer norm over the last dimension without scale or bias: rows of norm sqrt(d)."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def top_members(
    affinity: Float[Tensor, "b h n clusters"], size: int, *, strided: bool = False
) -> Int[Tensor, "b h clusters size"]:
    """Return the `size` tokens that fit each cluster best, as ascending token ids.

    Args:
        affinity: how well a token fits a cluster.
        size: tokens per cluster.
        strided: take every (n // size)-th token of the order instead: all degrees of fit.

    Raises:
        ArgumentError: naming `size`, unless 1 <= size <= n.
    """
    n = affinity.shape[2]
    if not 1 <= size <= n:
        raise bad("size", size, f"between 1 and the {n} tokens")
    ranked = affinity.transpose(2, 3)
    if strided:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        members = order[..., :: n // size][..., :size]
    else:
        members = ranked.topk(size, dim=-1).indices
    return members.sort(dim=-1).values


class OnlineKMeans(nn.Module):
    """Centroids per head, moved towards their members by an exponential moving average.

    Args:
        heads: number of heads H.
        clusters: number of centroids K of a head.
        width: channels d of a head.
        decay: of the moving averages.
        official: reproduce the authors' counting: from 0, and scrambled across heads (a bug).
    """

    means: Tensor
    ema_means: Tensor
    ema_count: Tensor

    def __init__(
        self, heads: int, clusters: int, width: int, *, decay: float = 0.999, official: bool = False
    ):
        super().__init__()
        if not 0 <= decay < 1:
            raise bad("decay", decay, "0 <= decay < 1")
        self.decay, self.official = decay, official
        self.register_buffer("means", torch.empty(heads, clusters, width))
        self.register_buffer("ema_means", torch.empty(heads, clusters, width))
        self.register_buffer("ema_count", torch.empty(heads, clusters))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centroids from a normal distribution, on the sphere, each counted as its own member.

        The authors count none, so that their first update divides by next to nothing.
        """
        nn.init.normal_(self.means)
        self.means.copy_(on_sphere(self.means))
        self.ema_means.copy_(self.means)
        self.ema_count.fill_(0.0 if self.official else 1.0)

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n clusters"]:
        """Return the product of every token with every centroid of its head."""
        return x @ self.means.to(x.dtype).transpose(-1, -2)

    def commitment(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, ""]:
        """Return the mean squared difference between tokens and their centroids; gradient to `x` alone."""
        nearest = self(x).argmax(-1)
        heads = torch.arange(x.shape[1], device=x.device)[:, None]
        return (x - self.means.to(x.dtype)[heads, nearest].detach()).square().mean()

    @torch.no_grad()
    def update(self, x: Float[Tensor, "b h n d"], present: Bool[Tensor, "b n"] | None = None) -> None:
        """Move the centroids towards their members.

        Args:
            x: tokens on the sphere.
            present: False for padding, which moves nothing.
        """
        x = x.to(self.means.dtype)
        hot = functional.one_hot(self(x).argmax(-1), self.means.shape[1]).to(x.dtype)
        if present is not None:
            hot = hot * present[:, None, :, None].to(x.dtype)
        counts = hot.sum((0, 2))
        if self.official:
            counts = hot.reshape(-1, *self.means.shape[:2]).sum(0)
        epsilon, clusters = 1e-5, self.means.shape[1]
        self.ema_count.lerp_(counts, 1 - self.decay)
        self.ema_means.lerp_(torch.einsum("bhnk,bhnd->hkd", hot, x), 1 - self.decay)
        total = self.ema_count.sum(-1, keepdim=True)
        smooth = (self.ema_count + epsilon) / (total + clusters * epsilon) * total
        moved = self.ema_means / smooth[..., None]
        # Without any member in a head (decay 0, or all padding) centroids keep their place, not 0 / 0.
        self.means.copy_(torch.where(smooth[..., None] > 0, moved, self.means))

    def extra_repr(self) -> str:
        """Show the sizes."""
        heads, clusters, width = self.means.shape
        return f"heads={heads}, clusters={clusters}, width={width}, decay={self.decay}"
