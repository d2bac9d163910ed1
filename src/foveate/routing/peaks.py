"""Density peaks: clusters around tokens that are dense and far from anything denser (Rodriguez & Laio, 2014).

No number of iterations and no random start: every token has a density and a distance to the nearest denser token;
those with the largest product are centres, and the others join the nearest centre.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad


class Peaks(NamedTuple):
    """Clusters of tokens: the number of each token's cluster, and the centre of each cluster, best first."""

    labels: Int[Tensor, "b n"]
    centres: Int[Tensor, "b m"]


@torch.no_grad()
def density_peaks(
    x: Float[Tensor, "b n c"],
    count: int,
    *,
    neighbours: int,
    noise: Float[Tensor, "b n"] | None = None,
    generator: torch.Generator | None = None,
    ties: bool = True,
) -> Peaks:
    """Cluster tokens by density peaks.

    d_ij = |x_i - x_j| / sqrt(C); density_i = exp(-mean of the k smallest d_ij^2), the token itself among them;
    reach_i = min_{j denser} d_ij, the largest distance of all where nothing is denser; centres have the largest
    density * reach.

    Args:
        x: tokens.
        count: number of clusters M, at most N.
        neighbours: k, at most N.
        noise: added to the densities, so that no two are equal.
        generator: draws that noise, uniform below 1e-6 as published, where it is not given.
        ties: of equally dense tokens the earlier one is denser. False: neither is, and both may become centres.

    Returns:
        labels and centres; centres belong to their own cluster. No gradient.

    Raises:
        ArgumentError: naming `count` or `neighbours`.
    """
    n = x.shape[1]
    for name, value in (("count", count), ("neighbours", neighbours)):
        if not 1 <= value <= n:
            raise bad(name, value, f"between 1 and the {n} tokens")
    x = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    density = (-distance.topk(neighbours, dim=-1, largest=False).values.square().mean(-1)).exp()
    if noise is None and generator is not None:
        noise = torch.rand(density.shape, generator=generator, dtype=density.dtype, device=x.device) * 1e-6
    if noise is not None:
        density = density + noise
    denser = density[:, None, :] > density[:, :, None]
    if ties:
        before = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
        denser = denser | ((density[:, None, :] == density[:, :, None]) & before)
    farthest = distance.amax((1, 2), keepdim=True)
    reach = torch.where(denser, distance, farthest).amin(-1)
    centres = (reach * density).topk(count, dim=-1).indices
    labels = distance.gather(1, centres[..., None].expand(-1, -1, n)).argmin(1)
    own = torch.arange(count, device=x.device).expand(len(x), -1)
    return Peaks(labels.scatter(1, centres, own), centres)


def merge_clusters(
    x: Float[Tensor, "b n c"],
    labels: Int[Tensor, "b n"],
    count: int,
    *,
    score: Float[Tensor, "b n"],
    eps: float = 1e-6,
) -> Float[Tensor, "b m c"]:
    """Return the mean token of each cluster, weighted by exp(score): sum exp(s) x / (sum exp(s) + eps).

    Args:
        x: tokens.
        labels: cluster of each token.
        count: number of clusters; one without tokens gives zeros.
        score: how much a token weighs, with gradient.
        eps: added to the sum of weights.
    """
    # The largest score is taken out of numerator and denominator, so that nothing overflows.
    top = score.detach().amax(1, keepdim=True)
    weight = (score - top).exp()
    total = weight.new_zeros(len(x), count).scatter_add(1, labels, weight) + eps * (-top).exp()
    share = weight / total.gather(1, labels)
    index = labels[..., None].expand(-1, -1, x.shape[2])
    return x.new_zeros(len(x), count, x.shape[2]).scatter_add(1, index, (x * share[..., None]).to(x.dtype))
