"""`Schedule`: the one intermediate representation of who attends to whom, in cells for kernels to execute."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.lazy import cached_property
from foveate.patterns.arrays import broadcast_leading
from foveate.patterns.boxes import BoxGroup
from foveate.patterns.groups import CellGroup
from foveate.patterns.tables import BoxProduct
from foveate.patterns.tiling import tile_for
from foveate.patterns.transpose import transpose_groups
from foveate.patterns.validate import check_combine, check_disjoint, check_group, stands_once

T = TypeVar("T")
# Entries materialised at a time where a schedule is expanded.
_CHUNK = 1 << 24
# One for all schedules: a lock of its own could not be made while torch.compile traces a Selection.
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Mean:
    """A query's output is the mean over the cells it stands in: sum / (number of cells + eps)."""

    eps: float = 0.0

    def __repr__(self) -> str:  # the one dataclasses make cannot be traced by torch.compile
        return f"Mean(eps={self.eps!r})"


class Weights:
    """A query's output is the sum over its cells of weight times the cell's output.

    Args:
        weights: one tensor per group of the schedule, in order, broadcastable to (B, H, C, tq): the factor of
            every query slot. Gradients flow into them.
    """

    def __init__(self, *weights: Float[Tensor, "b h c tq"]):
        self.weights = weights

    def __repr__(self) -> str:
        return f"Weights({', '.join(str(tuple(w.shape)) for w in self.weights)})"


Combine = Literal["lse", "sum"] | Mean | Weights


@dataclass(frozen=True, eq=False)
class Schedule:
    """Cells of queries and keys, and how the cells of one query combine.

    Attributes:
        n_q: number of queries.
        n_k: number of keys.
        groups: the cells, in groups of one shape. A query in no cell, or with no key, has output zero.
        combine: "lse": one rule over all keys of the query's cells, which must not overlap; "sum", `Mean` or
            `Weights`: each cell runs the rule over its own keys and the outputs combine.
        product: the closed form the groups came from, None when there is none.

    Counts (`pairs_*`, `n_cells`, `full_cells`, `partial_cells`) are over `leading`, the (b, h) that the cells
    distinguish: for a static schedule (1, 1), so that a caller multiplies by batch and heads. Static groups
    beside per-head ones count once per (b, h).

    Raises:
        ArgumentError: if lengths, groups or the combination make no sense. `validate()` checks the ids.
    """

    n_q: int
    n_k: int
    groups: tuple[CellGroup, ...]
    combine: Combine = "lse"
    product: BoxProduct | None = field(default=None, kw_only=True, repr=False)
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "groups", tuple(self.groups))
        for name, n in (("n_q", self.n_q), ("n_k", self.n_k)):
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise bad(name, n, "an integer >= 0")
        for index, group in enumerate(self.groups):
            if not isinstance(group, CellGroup):
                raise bad(f"groups[{index}]", type(group).__name__, "a BoxGroup or an ExplicitGroup")
        check_combine(self.combine, Mean, Weights)
        shapes = [group.leading for group in self.groups]
        if broadcast_leading(shapes) is None:
            raise bad("groups", shapes, "leading (b, h) that broadcast together")

    def __reduce__(self):
        return _rebuild, (self.n_q, self.n_k, self.groups, self.combine, self.product)

    @property
    def leading(self) -> tuple[int, int]:
        """(b, h) that the cells distinguish; (1, 1) for a static schedule."""
        lead = broadcast_leading([group.leading for group in self.groups])
        assert lead is not None
        return lead

    def _total(self, count: Callable[[CellGroup], int]) -> int:
        every = math.prod(self.leading)
        return sum(count(g) * (every // max(math.prod(g.leading), 1)) for g in self.groups)

    @cached_property
    def pairs_needed(self) -> int:
        """(query, key) pairs that the masks let through."""
        return self._total(lambda g: g.pairs_needed)

    @cached_property
    def pairs_computed(self) -> int:
        """Pairs touched when every cell is computed densely."""
        return self._total(lambda g: g.pairs_computed)

    @property
    def pairs_dense(self) -> int:
        """Pairs of dense attention."""
        return math.prod(self.leading) * self.n_q * self.n_k

    @cached_property
    def n_cells(self) -> int:
        """Number of cells."""
        return self._total(lambda g: math.prod(g.leading) * g.n_cells)

    @cached_property
    def full_cells(self) -> int:
        """Cells that need no mask."""
        return self._total(lambda g: g.full_cells)

    @property
    def partial_cells(self) -> int:
        """Cells that need a mask."""
        return self.n_cells - self.full_cells

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors the groups store; groups of a closed form share theirs."""
        if self.product is not None:
            return sum(c.nbytes for classes in self.product.axes for c in classes)
        return sum(g.nbytes for g in self.groups)

    @cached_property
    def is_single_cell(self) -> bool:
        """Whether each query stands in one cell at most (for every b and h), so that nothing combines."""
        return self.product is not None or stands_once(self.groups, self.n_q, self.leading)

    def expand(self) -> Int[Tensor, "b h n_q n_k"]:
        """Count, densely, how often each pair is let through (int32); for tests and small problems."""
        b, h = self.leading
        out = torch.zeros(b, h, self.n_q * self.n_k, dtype=torch.int32, device=self._device)
        for g in self.groups:
            step = max(1, _CHUNK // max(b * h * g.tq * g.tk, 1))
            for lo in range(0, g.n_cells, step):
                q, k, mask = g.q_ids(lo, lo + step), g.k_ids(lo, lo + step), g.mask(lo, lo + step)
                at = q.clamp(min=0)[..., :, None] * self.n_k + k.clamp(min=0)[..., None, :]
                shape = (b, h, *at.shape[2:])
                ones = torch.ones(1, dtype=torch.int32, device=at.device) if mask is None else mask.int()
                ones = ones.expand(shape) if mask is not None else ones.reshape(1, 1, 1, 1, 1).expand(shape)
                out.scatter_add_(2, at.expand(shape).reshape(b, h, -1), ones.reshape(b, h, -1))
        return out.reshape(b, h, self.n_q, self.n_k)

    def transpose(self, tile: int = 64) -> Schedule:
        """Return the schedule with queries and keys exchanged, in which each key stands in one cell at most.

        `schedule.transpose().expand()` is the transpose of `schedule.expand()`. Backward passes that are
        parallel over keys run on it: no two cells add to the gradient of the same key. A closed form stays
        one. Where a query stands in several cells with the same key, its id is repeated. Memoised.

        Args:
            tile: keys of a cell where there is no closed form.
        """
        return self.memo(("transpose", tile), lambda: self._transposed(tile))

    def _transposed(self, tile: int) -> Schedule:
        if self.product is not None:
            old = self.product
            rules = tuple(rule.transpose() for rule in old.rules())
            new = BoxProduct.of(rules, tile_for(rules), lead=(old.lead[1], old.lead[0]), linked=old.linked)
            return Schedule(self.n_k, self.n_q, new.groups(), "sum", product=new).to(self._device)
        # Index arithmetic happens where the ids are; the context costs as much as the arithmetic.
        with nullcontext() if self._device.type == "cpu" else self._device:
            groups = transpose_groups(self.groups, self.leading, self.n_k, tile)
        return Schedule(self.n_k, self.n_q, groups, "sum")

    def validate(self, *, disjoint: bool = True) -> Schedule:
        """Check every id, and return the schedule.

        Args:
            disjoint: also check, for `combine="lse"`, that no pair is let through twice (O(pairs) memory for
                one batch and head at a time unless every query stands in one cell).

        Raises:
            ArgumentError: naming the group and tensor, and the first wrong value.
        """
        for index, group in enumerate(self.groups):
            check_group(group, f"groups[{index}]", self.n_q, self.n_k)
        check_combine(self.combine, Mean, Weights, self.groups)
        if disjoint and self.combine == "lse" and self.product is None:
            check_disjoint(self.groups, self.n_q, self.n_k, self.leading)
        return self

    @property
    def _device(self) -> torch.device:
        for g in self.groups:
            return g.device if isinstance(g, BoxGroup) else g.q_ids(0, 1).device
        return torch.device("cpu")

    def to(self, device) -> Schedule:
        """Return the schedule with its tensors on `device` (memoised; itself when it is there already)."""
        device = torch.device(device)
        if self._device == device or not self.groups:
            return self
        return self.memo(("to", device), lambda: self._moved(device))

    def _moved(self, device: torch.device) -> Schedule:
        groups = tuple(g.to(device) for g in self.groups)
        return Schedule(self.n_q, self.n_k, groups, self.combine, product=self.product)

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """Return what `make()` returned the first time `key` was asked for, on this very schedule.

        Backends keep what they derive from the cells here (materialised ids, flattened arrays), so that it
        lives exactly as long as the schedule. Thread-safe; `make` runs once. While torch.compile traces it
        runs every time: what it makes then belongs to the graph and to no schedule.
        """
        if torch.compiler.is_compiling():
            return make()
        with _LOCK:
            if key not in self._memo:
                self._memo[key] = make()
            return self._memo[key]

    # A mix is a Selection, imported late because it is built upon this file.
    def __and__(self, other):
        """Keep the pairs that `other` (Pattern, Selection, Schedule) has too: a Selection."""
        return self._selection() & other

    def __or__(self, other):
        """Add the pairs of `other` (Pattern, Selection, Schedule): a Selection."""
        return self._selection() | other

    def __invert__(self):
        """All pairs the schedule does not have: a Selection."""
        return ~self._selection()

    __rand__ = __and__
    __ror__ = __or__

    def _selection(self):
        from foveate.patterns.selection import Selection

        return Selection.of_schedule(self)

    def __repr__(self) -> str:
        kind = "closed form" if self.product is not None else "explicit"
        return (
            f"Schedule({self.n_q} x {self.n_k}, {len(self.groups)} groups, {self.n_cells} cells, "
            f"combine={self.combine!r}, {kind})"
        )


def _rebuild(n_q, n_k, groups, combine, product) -> Schedule:
    return Schedule(n_q, n_k, groups, combine, product=product)
