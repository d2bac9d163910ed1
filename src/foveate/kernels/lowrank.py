"""`lowrank_error`: how far a low-rank matrix is from a softmax map, without forming either."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.attend import attend


def lowrank_error(
    coefficients: Float[Tensor, "b h q r"],
    basis: Float[Tensor, "r n"],
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h n d"],
    *,
    backend: str = "auto",
) -> Float[Tensor, ""]:
    """Return the sum of squares of C B - T, with T = softmax(q k^T / sqrt(D)).

    The three parts need no N x N matrix: |C B|^2 = sum C (B B^T) * C; <C B, T> = sum C * (T B^T), which is
    attention with B^T as values; and the squares of a row of T sum to exp(lse(2 l) - 2 lse(l)), l its logits.
    They cancel where the two are near: in float32 the result is good to some 1e-6 of |T|^2.

    Args:
        coefficients: C, with gradient.
        basis: B, with gradient, shared by batch and heads.
        q: queries of the map; no gradient.
        k: its keys; no gradient.
        backend: of `attend`.
    """
    q, k = q.detach(), k.detach()
    values = basis.mT.expand(*k.shape[:2], -1, -1)
    seen, lse = attend(q, k, values, return_lse=True, backend=backend)
    with torch.no_grad():
        _, twice = attend(q, k, k[..., :1], scale=2 * q.shape[-1] ** -0.5, return_lse=True, backend=backend)
        energy = (twice - 2 * lse).exp().sum()
    own = ((coefficients @ (basis @ basis.mT)) * coefficients).sum()
    return own - 2 * (coefficients * seen).sum() + energy
