"""`attend`, the first primitive: who attends (where), how strongly (score), by which rule (weigh, after)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.kernels.checks import check_where
from foveate.kernels.combine import combine_cells
from foveate.kernels.problem import Problem, dense_where
from foveate.kernels.select import BACKENDS, plan, tell_watchers
from foveate.scores.after import After
from foveate.scores.base import Extent, Score
from foveate.scores.pairs import Pairs, look_up
from foveate.scores.rules import Rule


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, where: Any = ..., score: Score | Iterable[Score] | None = ...,
    weigh: Rule | None = ..., after: After | Iterable[After] | None = ..., mask: Tensor | None = ...,
    scale: float | None = ..., backend: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, where: Any = ..., score: Score | Iterable[Score] | None = ...,
    weigh: Rule | None = ..., after: After | Iterable[After] | None = ..., mask: Tensor | None = ...,
    scale: float | None = ..., backend: str = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attend(
    q: Float[Tensor, "#b h n_q d"],
    k: Float[Tensor, "#b h_kv n_k d"],
    v: Float[Tensor, "#b h_kv n_k d_v"],
    *,
    where: Any = None,
    score: Score | Iterable[Score] | None = None,
    weigh: Rule | None = None,
    after: After | Iterable[After] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Float[Tensor, "_ h n_q d_v"] | tuple[Float[Tensor, "_ h n_q d_v"], Float[Tensor, "_ h n_q"]]:
    """Attend. With no keyword this is torch's scaled_dot_product_attention, layout included.

    In this order: logits = q.k^T * scale; `score` changes them; `where` and `mask` say which pairs exist;
    `weigh` turns them into weights; `after` changes those; out = weights.v. Pairs that may not attend have
    weight 0, a query without any key gets zeros (lse -inf) and no gradient, never NaN.

    Args:
        q: queries; N_q, N_k and B may be 0, and B may be 1 in some of the three to broadcast.
        k: keys; H_kv divides H (grouped queries: query head h reads key head h // (H / H_kv)).
        v: values, one row per key; D_v is free.
        where: a Pattern (static), Selection (per batch and head) or Schedule (cells with a way to combine).
        score: scores such as `RelativeTable`, `ALiBi`, `KeyBias`, `SoftCap`; `a + b` or a sequence, in order.
        weigh: `Softmax(sink)` (default), `Sigmoid(bias)`, `ReLU()`, `Exp()`.
        after: `Multiply`, `Add`, `Dropout`, or a sequence; never renormalised.
        mask: bool (True = may attend) or float (added to the logits), broadcastable to (B, H, N_q, N_k).
            NaN in a float mask is an error; it is looked for on the CPU only, and not while compiling or
            under functorch transforms, where looking would cost a synchronisation or a graph break.
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
        if not torch.compiler.is_compiling():
            tell_watchers(chosen)
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
    q, k, v = (x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v))
    return q, k, v, torch.autocast(device, enabled=False)


def apply(
    weights: Float[Tensor, "#b h n_q n_k"] | Float[Tensor, "#b h cells t_q t_k"] | Sequence[Tensor],
    v: Float[Tensor, "#b h_kv _ d_v"],
    where: Any = None,
) -> Float[Tensor, "_ h _ d_v"]:
    """Return the weighted sums of `v` under weights that are already there (outlook attention, re-used maps).

    Args:
        weights: dense `(B, H, N_q, N_k)`; or, with a Schedule (or a Selection), one `(B, H, cells, t_q,
            t_k)` tensor per group of its cells, rows and columns in the order of `group.q_ids()` and
            `group.k_ids()` (a single tensor when there is one group). Cells then combine as the schedule
            says, "lse" meaning a plain sum.
        v: values; H_kv divides H, B broadcasts.
        where: pairs outside it count nothing, whatever their weight. None = all.

    Returns:
        The sums, in the dtype of v; zeros for queries in no cell.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    cells = not isinstance(weights, Tensor) or weights.ndim == 5
    given = [weights] if isinstance(weights, Tensor) else list(weights)
    _check_apply(given, v, where, cells)
    compute = accumulation_dtype(v.dtype)
    heads = given[0].shape[1]
    values = v.to(compute).repeat_interleave(heads // v.shape[1], dim=1) if v.shape[1] else v.to(compute)
    device = v.device
    with torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext():
        if not cells:
            dense = given[0].to(compute)
            allowed = dense_where(where, dense.shape[2], dense.shape[3], device)
            dense = dense if allowed is None else dense.masked_fill(~allowed, 0.0)
            return (dense @ values).to(v.dtype)
        schedule = where if hasattr(where, "groups") else where.schedule
        batch = max(given[0].shape[0], v.shape[0]) if v.shape[0] else 0
        outs, ids = [], []
        for group, part in zip(schedule.groups, given, strict=True):
            q_ids, k_ids = group.q_ids().to(device), group.k_ids().to(device)
            at = Pairs(q_ids, k_ids, n_q=schedule.n_q, n_k=schedule.n_k)
            mask = group.mask()
            allowed = at.present if mask is None else at.present & mask.to(device)
            outs.append(part.to(compute).masked_fill(~allowed, 0.0) @ look_up(values, at.k))
            ids.append(q_ids)
        shape = (batch, heads, schedule.n_q, v.shape[-1])
        return combine_cells(outs, ids, schedule.combine, shape, values).to(v.dtype)


def _check_apply(given: list[Tensor], v: Tensor, where: Any, cells: bool) -> None:
    if not isinstance(v, Tensor) or v.ndim != 4:
        raise bad("v", tuple(v.shape) if isinstance(v, Tensor) else v, "4 dimensions (B, H, N_k, D_v)")
    for x, name in ((v, "v"), *((w, "weights") for w in given)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise bad(name, x.dtype if isinstance(x, Tensor) else x, "a floating point tensor")
        if x.device != v.device:
            raise bad(f"{name}.device", str(x.device), f"{v.device}, the device of v")
    if cells:
        schedule = where if hasattr(where, "groups") else getattr(where, "schedule", None)
        if schedule is None:
            hint = "lower(where, n_q, n_k) gives one, whose groups say which ids a cell holds."
            raise bad("where", where, "a Schedule or Selection, for weights given per cell", hint)
        if v.shape[2] != schedule.n_k:
            raise bad("v", tuple(v.shape), f"{schedule.n_k} rows, the keys of `where`")
        shapes = [(g.n_cells, g.tq, g.tk) for g in schedule.groups]
        got = [tuple(w.shape[2:]) for w in given]
        if got != shapes or any(w.ndim != 5 for w in given):
            raise bad("weights", [tuple(w.shape) for w in given], f"(B, H) followed by each of {shapes}")
    else:
        if given[0].ndim != 4 or given[0].shape[-1] != v.shape[2]:
            hint = "Per-cell weights have 5 dimensions."
            raise bad("weights", tuple(given[0].shape), f"(B, H, N_q, {v.shape[2]})", hint)
        if getattr(getattr(where, "schedule", where), "combine", "lse") != "lse":
            hint = "Give one (B, H, cells, t_q, t_k) tensor per group instead."
            raise bad(
                "weights", tuple(given[0].shape), "weights per cell, where cells combine otherwise", hint
            )
        if where is not None:
            check_where(where, Extent(v.shape[0], v.shape[1], given[0].shape[2], given[0].shape[3]))
    heads, batches = given[0].shape[1], {w.shape[0] for w in (*given, v)}
    if any(w.shape[1] != heads for w in given) or (
        v.shape[1] != heads and (not v.shape[1] or heads % v.shape[1])
    ):
        raise bad("v", tuple(v.shape), f"a number of heads that divides the {heads} heads of weights")
    if len(batches - {1}) > 1:
        raise bad("batch of weights, v", tuple(batches), "equal sizes, or 1 to broadcast")
