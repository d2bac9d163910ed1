"""`collect`: what the keys of a softmax attention receive from its queries, by a second pass of `attend`."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.attend import attend
from foveate.scores.bias import KeyBias


def collect(
    q: Float[Tensor, "#b h n_q d"],
    k: Float[Tensor, "#b h n_k d"],
    v: Float[Tensor, "#b h n_q d_v"],
    lse: Float[Tensor, "b h n_q"],
    *,
    where: Any = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "_ h n_k d_v"]:
    """Return `weights^T v`: for each key, the values of the queries, weighted by what they give to this key.

    With w = softmax(q k^T scale) over keys, out[k] = sum_q w[q, k] v[q]. The weights are never formed: they
    are exp(logit - lse), so that queries and keys change places and the lse of the first pass is a bias. The
    second pass is a softmax again, times the row sums it divided by, since every backend has a fast softmax.
    With v = 1 it tells how much attention each key receives (the column sums of w).

    Args:
        q: queries of the first pass.
        k: its keys; as many heads as q.
        v: one row per query.
        lse: what `attend(q, k, ..., return_lse=True)` returned, in whose graph gradients flow.
        where: who receives from whom: the transpose of the first pass's `where`, with keys as its queries.
        scale: that of the first pass.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    if k.ndim == 4 and q.ndim == 4 and k.shape[1] != q.shape[1]:
        raise bad("k", tuple(k.shape), f"{q.shape[1]} heads, as q has", "Repeat the shared heads of k first.")
    # Queries without a key have lse -inf; they give nothing to anybody.
    bias = (-lse).masked_fill(lse.isneginf(), float("-inf"))
    score = KeyBias(bias)
    mean, total = attend(k, q, v, where=where, score=score, scale=scale, backend=backend, return_lse=True)
    # No row sum exceeds the number of queries, as no weight exceeds 1.
    return (mean * total.exp().unsqueeze(-1)).to(mean.dtype)
