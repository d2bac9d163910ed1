"""`attend`, the first primitive: who attends (where), how strongly (score), by which rule (weigh, after)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.problem import Problem
from foveate.scores.after import After
from foveate.scores.base import Score
from foveate.scores.rules import Rule

try:
    from foveate.kernels.select import BACKENDS, plan
except ModuleNotFoundError:  # until select.py lands
    from types import SimpleNamespace

    from foveate.kernels import reference

    BACKENDS = {"reference": reference}

    def plan(problem, backend="auto"):
        return SimpleNamespace(backend="reference")


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **rest: Any) -> Tensor: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **rest: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **rest: Any
) -> Tensor | tuple[Tensor, Tensor]: ...
def attend(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k d_v"],
    *,
    where: Any = None,
    score: Score | Iterable[Score] | None = None,
    weigh: Rule | None = None,
    after: After | Iterable[After] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Float[Tensor, "b h n_q d_v"] | tuple[Float[Tensor, "b h n_q d_v"], Float[Tensor, "b h n_q"]]:
    """Attend. With no keyword this is torch's scaled_dot_product_attention, layout included.

    In this order: logits = q.k^T * scale; `score` changes them; `where` and `mask` say which pairs exist;
    `weigh` turns them into weights; `after` changes those; out = weights.v. Pairs that may not attend have weight
    0, a query without any key gets zeros (lse -inf) and no gradient, never NaN.

    Args:
        q: queries; N_q, N_k and B may be 0, and B may be 1 in some of the three to broadcast.
        k: keys; H_kv divides H (grouped queries: query head h reads key head h // (H / H_kv)).
        v: values, one row per key; D_v is free.
        where: a Pattern (static), Selection (per batch and head) or Schedule (cells with a way to combine).
        score: scores such as `RelativeTable`, `ALiBi`, `KeyBias`, `SoftCap`; `a + b` or a sequence, in order.
        weigh: `Softmax(sink)` (default), `Sigmoid(bias)`, `ReLU()`, `Exp()`.
        after: `Multiply`, `Add`, `Dropout`, or a sequence; never renormalised.
        mask: bool (True = may attend) or float (added to the logits), broadcastable to (B, H, N_q, N_k).
            NaN in a float mask is an error; it is looked for on the CPU only, and not while compiling or under
            functorch transforms, where looking would cost a synchronisation or a graph break.
        scale: factor on q.k^T, D**-0.5 by default.
        backend: "auto", or the name of one: it runs there or raises.
        return_lse: also return the natural logarithm of each row's sum, (B, H, N_q) in float32 (float64 for
            float64), differentiable.

    Returns:
        The output in the dtype of q (under autocast: the autocast dtype, as SDPA does), or `(out, lse)`.

    Raises:
        ArgumentError: naming the argument that does not fit.
        UnsupportedError: if the named backend cannot serve the call; the message says why.
        UnknownNameError: if there is no backend of that name.
    """
    q, k, v, quiet = _autocast(q, k, v)
    with quiet:
        problem = Problem.of(
            q, k, v, where=where, score=score, weigh=weigh, after=after, mask=mask, scale=scale,
            return_lse=return_lse,
        )  # fmt: skip
        chosen = plan(problem, backend)
        out, lse = BACKENDS[chosen.backend].run(problem, chosen)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, Any]:
    """Cast as autocast does for SDPA (float64 stays), and return a context in which nothing else is cast."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v, nullcontext()
    dtype = torch.get_autocast_dtype(device)
    cast = (
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (q, k, v)
    )
    return *cast, torch.autocast(device, enabled=False)
