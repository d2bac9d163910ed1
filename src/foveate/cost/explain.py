"""`explain`: what a call of `attend` would do and cost, before anything runs; EXPLAIN, as in a database."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.cost.render import as_rich, as_text
from foveate.kernels.checks import Input
from foveate.kernels.problem import Problem
from foveate.kernels.select import Plan, plan
from foveate.scores.after import After
from foveate.scores.base import Score
from foveate.scores.rules import Rule


@dataclass(frozen=True)
class Explanation:
    """The plan of one call in numbers. `str()` and rich's print show it as a table.

    All counts are over batch and query heads. `mask` tensors and values of scores are not looked into;
    phantom keys (border="zero") count as needed, since they take part in the softmax.

    Attributes:
        pairs_needed: (query, key) pairs that `where` lets through.
        pairs_computed: pairs the chosen backend multiplies.
        pairs_dense: pairs of dense attention.
        full_tiles: cells in which every pair counts.
        partial_tiles: cells that need a mask.
        flops: of the forward.
        flops_backward: of the backward.
        bytes: moved at least by the forward: q, k, v and out once, and the keys and values cells gather.
        speedup_bound: how many times faster than dense attention the forward can be.
        speedup_bound_backward: the same for forward and backward together.
        backend: who would run it.
        detail: how it runs here, such as the instruction set of the C++ core; often empty.
        reasons: backend -> one sentence on why it would not.
        tile: queries of a cell per axis of the pattern's grid, None without cells or when cells are given.
        device: what it was planned for.
        dtype: likewise.
        where: `where` as text.
    """

    pairs_needed: int
    pairs_computed: int
    pairs_dense: int
    full_tiles: int
    partial_tiles: int
    flops: int
    flops_backward: int
    bytes: int
    speedup_bound: float
    speedup_bound_backward: float
    backend: str
    reasons: dict[str, str]
    tile: tuple[int, ...] | None
    batch: int
    heads: int
    n_q: int
    n_k: int
    d: int
    d_v: int
    device: str
    dtype: str
    where: str
    detail: str = ""

    @property
    def needed_share(self) -> float:
        """Part of the dense pairs that is needed."""
        return self.pairs_needed / self.pairs_dense if self.pairs_dense else 0.0

    @property
    def computed_share(self) -> float:
        """Part of the dense pairs that is computed."""
        return self.pairs_computed / self.pairs_dense if self.pairs_dense else 0.0

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Any:
        return as_rich(self)


def explain(
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
    backend: str = "auto",
    return_lse: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Explanation:
    """Explain `attend(q, k, v, ...)` with the same arguments; nothing is computed.

        print(explain((1, 8, 4096, 64), (1, 8, 4096, 64), (1, 8, 4096, 64), where=Neighborhood((64, 64), 13)))

    Args:
        q, k, v: tensors, or their bare shapes (B, H, N, D).
        where, score, weigh, after, mask, scale, backend, return_lse: as for `attend`.
        dtype: of bare shapes.
        device: on which bare shapes are thought to be, "cpu" by default.

    Raises:
        ArgumentError: naming the argument that does not fit.
        UnsupportedError: if the named backend cannot serve the call.
        UnknownNameError: if there is no backend of that name.
    """
    problem = Problem.of(
        q, k, v, where=where, score=score, weigh=weigh, after=after, mask=mask, scale=scale,
        return_lse=return_lse, dtype=dtype, device=device,
    )  # fmt: skip
    return explain_plan(plan(problem, backend), problem, where)


def explain_plan(chosen: Plan, problem: Problem, where: Any = None) -> Explanation:
    """Put a finished plan into numbers."""
    names = (
        "pairs_needed", "pairs_computed", "pairs_dense", "full_tiles", "partial_tiles", "flops",
        "flops_backward", "bytes", "speedup_bound", "speedup_bound_backward", "backend", "reasons",
        "batch", "heads", "n_q", "n_k", "d", "d_v", "detail",
    )  # fmt: skip
    return Explanation(
        **{name: getattr(chosen, name) for name in names},
        tile=chosen.cell_tile,
        device=str(problem.device),
        dtype=str(problem.dtype).removeprefix("torch."),
        where="all pairs" if where is None else repr(where),
    )
