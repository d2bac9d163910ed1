"""`Problem`: one validated call of `attend`: all a backend may ask, and every error a caller can cause."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.kernels.checks import (
    Input,
    as_tensor,
    check_mask,
    check_part,
    check_qkv,
    check_scale,
    check_where,
)
from foveate.patterns.intern import interned, padded
from foveate.scores.after import After, as_afters
from foveate.scores.base import Extent, Score, as_scores, lift
from foveate.scores.pairs import KeyFrame, Pairs
from foveate.scores.rules import Rule, as_rule


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
        q, k, v = (as_tensor(x, name, dtype, bare) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        batch = check_qkv(q, k, v)
        q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
        extent = Extent(batch, q.shape[1], q.shape[2], k.shape[2])
        scores, rule, afters = as_scores(score), as_rule(weigh), as_afters(after)
        where_on = torch.device(device or "cpu") if bare else q.device
        for argument, parts in (("score", scores), ("weigh", (rule,)), ("after", afters)):
            for part in parts:
                check_part(argument, part, extent, where_on)
        mask = check_mask(mask, extent, where_on)
        where = interned(where)
        check_where(where, extent)
        frame = None
        if getattr(where, "has_phantoms", False):
            where, frame = _without_phantoms(where)
            k, v = frame.pad(k, dim=2), frame.pad(v, dim=2)
        problem = cls(
            q=q, k=k, v=v, where=where, score=scores, weigh=rule, after=afters, mask=mask,
            scale=check_scale(scale, q.shape[-1]), return_lse=bool(return_lse), frame=frame, device=where_on,
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


def _without_phantoms(where: Any) -> tuple[Any, KeyFrame]:
    """Return the pattern over the padded key grid, and where that grid lies."""
    wide = padded(where)
    assert wide is not None
    base = Grid(*(n - a - b for n, a, b in zip(wide.key_grid, wide.lo, wide.hi, strict=True)))
    return wide.pattern, KeyFrame(base, wide.key_grid, tuple(wide.lo))
