"""How the outputs of cells come back to queries that stand in several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad


def combine_cells(
    outs: Sequence[Float[Tensor, "b h cells tq dv"]],
    q_ids: Sequence[Int[Tensor, "bi hi cells tq"]],
    combine: Any,
    shape: tuple[int, int, int, int],
    like: Tensor,
) -> Float[Tensor, "b h nq dv"]:
    """Bring the outputs of cells back to their queries; a query in no cell gets zeros.

    Args:
        outs: one tensor per group of cells, zero in rows of absent queries or not: they are left out.
        q_ids: the query of every row, -1 = absent.
        combine: "sum" or "lse" (which for finished outputs is a sum), `Mean` or `Weights`.
        shape: `(B, H, N_q, D_v)`.
        like: gives dtype and device of the result.
    """
    b, h, n_q, d_v = shape
    total, count = like.new_zeros(shape), like.new_zeros(b, h, n_q)
    factors = _factors(combine, len(outs))
    for out, ids, factor in zip(outs, q_ids, factors, strict=True):
        present = (ids >= 0).to(out.dtype)
        if factor is not None:
            out = out * factor.to(out.dtype).unsqueeze(-1)
        rows = (out * present.unsqueeze(-1)).expand(b, h, *out.shape[2:]).flatten(2, -2)
        index = ids.clamp_min(0).expand(b, h, *ids.shape[2:]).flatten(2)
        total = total.scatter_add(2, index.unsqueeze(-1).expand(-1, -1, -1, d_v), rows)
        count = count.scatter_add(2, index, present.expand(b, h, *ids.shape[2:]).flatten(2))
    if hasattr(combine, "eps"):
        return _divide(total, count.unsqueeze(-1) + combine.eps)
    return total


def _divide(total: Tensor, count: Tensor) -> Tensor:
    return total / count.masked_fill(count == 0, 1.0)


def _factors(combine: Any, n_groups: int) -> Sequence[Tensor | None]:
    weights = getattr(combine, "weights", None)
    if weights is None:
        return [None] * n_groups
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if len(weights) != n_groups:
        raise bad("Weights", len(weights), f"{n_groups} tensors (b, h, cells, t_q), one per group of cells")
    return weights
