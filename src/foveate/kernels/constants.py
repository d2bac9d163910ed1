"""What torch.compile must not look into: everything derived from a static `where` alone.

Lowering a pattern is Python over integers and depends on nothing but the pattern and two lengths. While
tracing, `constant_while_tracing` runs it for real and takes the result as a constant of the graph, guarded by
the identity of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from foveate.core.tracing import constant_while_tracing
from foveate.kernels.cells import CellView
from foveate.kernels.program import program, views
from foveate.patterns.lower import default_tile, lower
from foveate.patterns.schedule import Schedule

P = ParamSpec("P")
T = TypeVar("T")

# The tile model of `patterns/tiling.py`, priced for strips and fused calls: copying a key is cheap here, and
# a cell is a task of the fused operator.
KEY_COST, CELL_COST = 8.0, 2048.0
# Dense masks kept for backend "sdpa": no more entries, and no larger ones, than this.
_MASKS, _MASK_BYTES = 4, 64 << 20


def is_traced(x: Tensor) -> bool:
    """Whether `x` belongs to a torch.func transform (vmap, grad, jvp). Not asked while compiling: False."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def constant(fn: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of constants for torch.compile, and run it outside of fake and tracing modes
    (torch.export).

    Without the second, the caches would keep fake tensors of one trace and hand them to every later call.
    """

    @wraps(fn)
    def real(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._len_torch_dispatch_stack():
            return fn(*args, **kwargs)
        with _disable_current_modes():
            return fn(*args, **kwargs)

    return constant_while_tracing(real)


def lowered(where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None) -> Schedule:
    """Return the cells of a static pattern, in tiles that suit the backend `tiles` unless told otherwise."""
    return lower(where, n_q, n_k, lowered_tile(where, n_q, n_k) if tile is None else tile)


@lru_cache(maxsize=128)
def lowered_tile(where: Any, n_q: int, n_k: int) -> tuple[int, ...] | None:
    """Return the tile `lowered` takes by itself, None where the pattern brings its own blocks."""
    if where.own_block is not None:
        return None
    return default_tile(where, n_q, n_k, key_cost=KEY_COST, cell_cost=CELL_COST)


@constant
def static_counts(where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Return (pairs computed, key rows copied, fused calls) of a static pattern, per batch and head."""
    schedule = lowered(where, n_q, n_k, tile)
    return schedule.memo("tiles counts", lambda: _counts(schedule))


def _counts(schedule: Schedule) -> tuple[int, int, int]:
    rows = sum(g.n_cells * g.tk for g in schedule.groups)
    return schedule.pairs_computed, rows, len(schedule.groups)


@constant
def static_program(
    where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None, device: torch.device
) -> tuple[tuple[int, ...], tuple[Tensor, ...], int]:
    """Return the Program of a static pattern, as a plain tuple."""
    return tuple(program(lowered(where, n_q, n_k, tile), device))  # type: ignore[return-value]


@constant
def static_views(
    where: Any, n_q: int, n_k: int, tile: tuple[int, ...] | None, device: torch.device
) -> tuple[CellView, ...]:
    """Return the items of `static_program` as tensors."""
    return views(lowered(where, n_q, n_k, tile), device)


@constant
def dense_mask(where: Any, n_q: int, n_k: int, device: torch.device) -> Tensor:
    """Return `where.dense(n_q, n_k)` on a device; small ones are kept."""
    if n_q * n_k > _MASK_BYTES:
        return where.dense(n_q, n_k, device=device)
    return _kept_mask(where, n_q, n_k, device)


@lru_cache(maxsize=_MASKS)
def _kept_mask(where: Any, n_q: int, n_k: int, device: torch.device) -> Tensor:
    return where.dense(n_q, n_k, device=device)
