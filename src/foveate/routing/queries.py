"""Queries that are routed away: per batch and head, only some of the queries attend at all.

A head that a token did not choose has nothing to compute for it. `keep_queries` says so to the kernels: its
Selection has the pairs of the chosen queries only, and every other row of the output is zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.tracing import constant_while_tracing, fixed
from foveate.patterns.cells import Cells
from foveate.patterns.intern import interned
from foveate.patterns.lower import lower
from foveate.patterns.pattern import Pattern, check_int
from foveate.patterns.selection import Selection

# Pairs whose masks are worth keeping from call to call, a byte each.
KEPT_PAIRS = 1 << 24


def keep_queries(
    chosen: Bool[Tensor, "#b #h n_q"], n_k: int, where: Pattern | Selection | None = None
) -> Selection:
    """Return the pairs of `where` whose query was chosen.

    Args:
        chosen: per batch and head, True for queries that attend; sizes of 1 are shared.
        n_k: number of keys.
        where: what a chosen query sees, a static pattern or a selection; every key by default. Chosen queries
            then move together into one cell per batch and head, so that every backend computes only as many
            rows as the busiest head has (looking that up waits for the device; compiled code does without, and
            leaves gaps). With a `where` its own cells are kept, with gaps where nobody was chosen.

    Raises:
        ArgumentError: naming `chosen`, `n_k` or `where`.
    """
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.ndim != 3:
        shown = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else chosen
        raise bad("chosen", shown, "a bool tensor (B or 1, H or 1, N_q)")
    n_q = chosen.shape[2]
    check_int(n_k, "n_k", 0)
    if where is None:
        return Selection(_front(chosen), _every(n_k, chosen.device), n_q=n_q, n_k=n_k)
    if isinstance(where, Pattern):
        static = _static(interned(where), fixed(n_q), fixed(n_k))
        cells = [_moved(cell, chosen.device) for cell in static]
        return Selection.of_cells([_kept(cell, chosen) for cell in cells], n_q, n_k)
    if not isinstance(where, Selection):
        raise bad("where", where, "a Pattern, a Selection, or None for all keys")
    where.check(n_q, n_k)
    return Selection.of_cells([_kept(cell, chosen) for cell in where.cells], n_q, n_k, where.combine)


def _every(n_k: int, device: torch.device) -> Tensor:
    return torch.arange(n_k, device=device).expand(1, 1, 1, n_k)


def _front(chosen: Tensor) -> Tensor:
    """Return the ids of chosen queries in ascending order, -1 behind them, (b, h, 1, most)."""
    n_q = chosen.shape[2]
    ids = torch.where(chosen, torch.arange(n_q, device=chosen.device), n_q).sort(-1).values
    most = n_q
    if chosen.numel() and not torch.compiler.is_compiling():
        most = max(1, int(chosen.sum(-1).max()))
    ids = ids[..., :most]
    return torch.where(ids < n_q, ids, -1).unsqueeze(2)


@constant_while_tracing
def _static(where: Pattern, n_q: int, n_k: int) -> tuple[Cells, ...]:
    """Return the cells of a pattern; those of the last few are kept, unless they are large."""
    where.check(n_q, n_k)
    if where.padded() is not None:
        raise bad("where", where, "a pattern without phantom keys", "Use border='mask' or 'clamp'.")
    # Inside of fake and tracing modes tensors are not real, and nobody else may get them.
    keep = n_q * n_k <= KEPT_PAIRS and not torch._C._len_torch_dispatch_stack()
    return (_cells if keep else _cells.__wrapped__)(where, n_q, n_k)


@lru_cache(maxsize=4)
def _cells(where: Pattern, n_q: int, n_k: int) -> tuple[Cells, ...]:
    return Selection.of_schedule(lower(where, n_q, n_k)).cells


def _moved(cell: Cells, device: torch.device) -> Cells:
    mask = None if cell.mask is None else cell.mask.to(device)
    return Cells(cell.q_ids.to(device), cell.k_ids.to(device), mask)


def _kept(cell: Cells, chosen: Tensor) -> Cells:
    """Take queries that were not chosen out of a cell."""
    b, h = torch.broadcast_shapes(cell.q_ids.shape[:2], chosen.shape[:2])
    ids = cell.q_ids.expand(b, h, -1, -1)
    keep = chosen.expand(b, h, -1).gather(-1, ids.flatten(2).clamp(min=0)).view(ids.shape)
    return Cells(torch.where(keep, ids, -1), cell.k_ids.expand(b, h, -1, -1), cell.mask)
