"""`Problem`: one validated call of `attend`: all a backend may ask, and every error a caller can cause."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource]

from foveate.core.dtypes import FLOATS, accumulation_dtype
from foveate.core.errors import ArgumentError, bad
from foveate.core.grid import Grid
from foveate.patterns.intern import interned, padded
from foveate.scores.after import After, as_afters
from foveate.scores.base import Extent, Part, Score, as_scores, lift
from foveate.scores.pairs import KeyFrame, Pairs
from foveate.scores.rules import Rule, as_rule

Input = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated call. Build it with `Problem.of`; backends only read it.

    Attributes:
        q: `(B, H, N_q, D)`.
        k: `(B, H_kv, N_k, D)`, phantom keys included (as zero rows).
        v: `(B, H_kv, N_k, D_v)`, likewise.
        where: None, a Pattern, a Selection or a Schedule; never one with phantoms left.
        score: scores in order, flat.
        weigh: the rule.
        after: after-values in order, flat.
        mask: None or 4-d, bool or float, broadcastable to `(B, H, N_q, real keys)`.
        scale: factor on q.k^T.
        return_lse: whether the caller wants the lse.
        frame: how padded keys sit on the grid, None without phantoms.
        device: where it will run: that of the tensors, or the one named for a problem of bare shapes.
    """

    q: Float[Tensor, "b h nq d"]
    k: Float[Tensor, "b hkv nk d"]
    v: Float[Tensor, "b hkv nk dv"]
    where: Any
    score: tuple[Score, ...]
    weigh: Rule
    after: tuple[After, ...]
    mask: Tensor | None
    scale: float
    return_lse: bool
    frame: KeyFrame | None
    device: torch.device

    @classmethod
    def of(
        cls,
        q: Input,
        k: Input,
        v: Input,
        *,
        where: Any = None,
        score: Score | Iterable[Score] | None = None,
        weigh: Rule | None = None,
        after: After | Iterable[After] | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Problem:
        """Validate the arguments of `attend`; bare shapes instead of tensors become meta tensors of `dtype`.

        Args:
            device: for bare shapes, the device the call is thought to run on (default "cpu").

        Raises:
            ArgumentError: naming the argument that does not fit.
        """
        bare = not any(isinstance(x, Tensor) for x in (q, k, v))
        q, k, v = (_tensor(x, name, dtype, bare) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        batch = _check_qkv(q, k, v)
        q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
        extent = Extent(batch, q.shape[1], q.shape[2], k.shape[2])
        scores, rule, afters = as_scores(score), as_rule(weigh), as_afters(after)
        where_on = torch.device(device or "cpu") if bare else q.device
        for argument, parts in (("score", scores), ("weigh", (rule,)), ("after", afters)):
            for part in parts:
                _check_part(argument, part, extent, where_on)
        mask = _check_mask(mask, extent, where_on)
        where = interned(where)
        check_where(where, extent)
        frame = None
        if getattr(where, "has_phantoms", False):
            where, frame = _without_phantoms(where)
            k, v = frame.pad(k, dim=2), frame.pad(v, dim=2)
        problem = cls(
            q=q, k=k, v=v, where=where, score=scores, weigh=rule, after=afters, mask=mask,
            scale=_check_scale(scale, q.shape[-1]), return_lse=bool(return_lse), frame=frame, device=where_on,
        )  # fmt: skip
        problem._check_lse()
        return problem

    # ---- sizes ---------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """H_kv; query head h reads key head h // (H / H_kv)."""
        return self.k.shape[1]

    @property
    def n_q(self) -> int:
        """Number of queries."""
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        """Number of keys, phantoms included."""
        return self.k.shape[2]

    @property
    def d(self) -> int:
        """Head size of q and k."""
        return self.q.shape[3]

    @property
    def d_v(self) -> int:
        """Head size of v and of the output."""
        return self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q, k, v and the output."""
        return self.q.dtype

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of logits, weights, sums and the lse."""
        return accumulation_dtype(self.q.dtype)

    # ---- what it asks for ----------------------------------------------------------------------------

    @property
    def needs_grad(self) -> bool:
        """Whether some tensor of the call requires a gradient (in a mode that records one)."""
        parts = (*self.score, self.weigh, *self.after)
        held = [t for part in parts for t in part.tensors().values()]
        held += getattr(self.combine, "weights", ())
        found = [self.q, self.k, self.v, *held] + ([self.mask] if self.mask is not None else [])
        return torch.is_grad_enabled() and any(t.requires_grad for t in found)

    @property
    def schedule(self) -> Any:
        """The Schedule that `where` is or carries, None for a Pattern or no `where`."""
        if hasattr(self.where, "groups"):
            return self.where
        return getattr(self.where, "schedule", None)

    @property
    def combine(self) -> Any:
        """How cells combine: "lse" (one rule over all keys of a query), "sum", `Mean` or `Weights`."""
        return getattr(self.where, "combine", "lse")

    @property
    def one_rule(self) -> bool:
        """Whether the rule runs once over all keys of a query, so that a dense mask says everything."""
        return isinstance(self.combine, str) and self.combine == "lse"

    def allowed(self, device: torch.device | None = None) -> Bool[Tensor, "b h nq nk"] | None:
        """Return the dense mask of `where` (b and h are 1 for static ones), None when all is allowed."""
        return dense_where(self.where, self.n_q, self.n_k, device or self.q.device)

    def pairs(
        self, q_ids: Int[Tensor, "b h *cells tq"], k_ids: Int[Tensor, "b h *cells tk"], *, alike: bool = False
    ) -> Pairs:
        """Return the Pairs of a block of cells; see `Pairs` for `alike`."""
        return Pairs(q_ids, k_ids, n_q=self.n_q, n_k=self.n_k, frame=self.frame, alike=alike)

    def all_pairs(self) -> Pairs:
        """Return the Pairs of the whole problem."""
        return Pairs.full(self.n_q, self.n_k, device=self.q.device, frame=self.frame)

    def _check_lse(self) -> None:
        if not self.return_lse:
            return
        if not self.weigh.has_lse:
            hint = "Leave return_lse out, or weigh with Softmax()."
            raise bad("return_lse", True, f"False with {self.weigh!r}, which has no row sum", hint)
        if not self.one_rule:
            hint = "Every cell has a row sum of its own then."
            raise bad("return_lse", True, f"False where cells combine by {self.combine!r}", hint)


def dense_where(where: Any, n_q: int, n_k: int, device: torch.device) -> Bool[Tensor, "b h nq nk"] | None:
    """Return `where` as a bool mask with 4 dimensions; None means everything."""
    if where is None:
        return None
    if hasattr(where, "groups"):
        mask = where.expand().to(device) > 0
    elif hasattr(where, "schedule"):
        mask = where.dense().to(device)
    else:
        mask = where.dense(n_q, n_k, device=device)
    return lift(mask, 4)


def _tensor(x: Input, name: str, dtype: torch.dtype, bare: bool) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if bare and isinstance(x, (tuple, list, torch.Size)) and all(isinstance(s, int) for s in x):
        return torch.empty(tuple(x), dtype=dtype, device="meta")
    raise bad(name, x, "a tensor (B, H, N, D)" if not bare else "a tensor or a shape (B, H, N, D)")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check the three tensors against each other and return the batch size."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            hint = "Put the missing dimensions in with x[None]." if x.ndim < 4 else "Flatten the grid into N."
            raise bad(name, tuple(x.shape), "4 dimensions (B, H, N, D)", hint)
        if x.dtype not in FLOATS:
            hint = "Convert it with .float() or the dtype of your model."
            raise bad(f"{name}.dtype", x.dtype, "float16, bfloat16, float32 or float64", hint)
        if x.dtype != q.dtype:
            raise bad(f"{name}.dtype", x.dtype, f"{q.dtype}, the dtype of q", f"Use {name}.to(q.dtype).")
        if x.device != q.device:
            hint = f"Move it with {name}.to(q.device)."
            raise bad(f"{name}.device", str(x.device), f"{q.device}, the device of q", hint)
    if q.shape[-1] == 0:
        raise bad("q", tuple(q.shape), "a head size of at least 1")
    if k.shape[-1] != q.shape[-1]:
        raise bad("k", tuple(k.shape), f"head size {q.shape[-1]}, that of q")
    if v.shape[2] != k.shape[2]:
        raise bad("v", tuple(v.shape), f"{k.shape[2]} rows, one per key")
    if v.shape[1] != k.shape[1]:
        raise bad("v", tuple(v.shape), f"{k.shape[1]} heads, as k has")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        hint = "Each key head serves the same number of query heads."
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {heads} heads of q", hint)
    sizes = {x.shape[0] for x in (q, k, v)}
    if len(sizes - {1}) > 1:
        shown = tuple(x.shape[0] for x in (q, k, v))
        raise bad("batch of q, k, v", shown, "equal sizes, or 1 to broadcast")
    return next(iter(sizes - {1}), 1)


def _check_part(argument: str, part: Part, extent: Extent, device: torch.device) -> None:
    try:
        part.check(extent)
    except ArgumentError as error:
        raise ArgumentError(f"{argument}: {error}") from None
    for name, tensor in part.tensors().items():
        if tensor.device != device:
            got = f"{type(part).__name__}.{name} on {tensor.device}"
            raise bad(argument, got, f"tensors on {device}, the device of q")


def _check_mask(mask: Any, extent: Extent, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        hint = "Patterns and Selections go to where=."
        raise bad("mask", mask, "a bool or float tensor", hint)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise bad(
            "mask", mask.dtype, "a bool tensor (True = may attend) or a float tensor (added to the logits)"
        )
    if mask.device != device:
        raise bad("mask", f"a tensor on {mask.device}", f"one on {device}, the device of q")
    shape, sizes = tuple(mask.shape), tuple(extent)
    fits = len(shape) <= 4 and all(
        s in (1, size) for s, size in zip(reversed(shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise bad("mask", shape, f"a shape that broadcasts to (B, H, N_q, N_k) = {sizes}")
    if mask.is_floating_point() and _can_look(mask) and bool(torch.isnan(mask).any()):
        hint = "Use -inf where a pair may not attend, or a bool mask."
        raise bad("mask", "NaN entries", "a float mask without NaN", hint)
    return lift(mask, 4)


def _can_look(x: Tensor) -> bool:
    """Whether reading the values is free: on the CPU, not while tracing, not under a functorch transform."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(x)


def check_where(where: Any, extent: Extent) -> None:
    """Raise an ArgumentError naming `where` unless it is one and fits the lengths."""
    if where is None:
        return
    if isinstance(where, Tensor):
        hint = "Pass a tensor as mask=, or wrap a static one in Explicit(mask)."
        raise bad("where", f"Tensor{tuple(where.shape)}", "a Pattern, Selection or Schedule", hint)
    if isinstance(where, type) or not (hasattr(where, "dense") or hasattr(where, "groups")):
        raise bad("where", where, "a Pattern, Selection or Schedule instance")
    if hasattr(where, "check"):
        where.check(extent.n_q, extent.n_k)
    elif hasattr(where, "n_q") and (where.n_q, where.n_k) != (extent.n_q, extent.n_k):
        raise bad("where", (where.n_q, where.n_k), f"(N_q, N_k) = {(extent.n_q, extent.n_k)}")
    told_apart = getattr(where, "leading", None) or getattr(where, "batch", None)
    if told_apart is not None and not all(
        a in (1, b) for a, b in zip(told_apart, (extent.batch, extent.heads), strict=True)
    ):
        expected = f"cells for (1 or {extent.batch}, 1 or {extent.heads}) batch elements and heads"
        raise bad("where", tuple(told_apart), expected)


def _without_phantoms(where: Any) -> tuple[Any, KeyFrame]:
    """Return the pattern over the padded key grid, and where that grid lies."""
    wide = padded(where)
    assert wide is not None
    base = Grid(*(n - a - b for n, a, b in zip(wide.key_grid, wide.lo, wide.hi, strict=True)))
    return wide.pattern, KeyFrame(base, wide.key_grid, tuple(wide.lo))


def _check_scale(scale: Any, d: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(d)
    if isinstance(scale, (Tensor, bool)) or not isinstance(scale, numbers.Real):
        hint = (
            "A learned or per-head temperature is score=RowFactor(...)." if isinstance(scale, Tensor) else ""
        )
        shown = f"Tensor{tuple(scale.shape)}" if isinstance(scale, Tensor) else scale
        raise bad("scale", shown, "a number", hint)
    return float(scale)
