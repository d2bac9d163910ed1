"""Flattened cells with own and other rows exchanged, by the core: routed cells are new in every call."""

from __future__ import annotations

import torch

from foveate.core.errors import UnsupportedError
from foveate.kernels.cpu.flatten import Facts, Flat
from foveate.kernels.cpu.job import cells_argument
from foveate.kernels.cpu.library import library


def transposed(flat: Flat, facts: Facts, n_other: int) -> tuple[Flat, Facts]:
    """Return the same pairs in cells that own what was streamed: each other row in one cell at most.

    Args:
        flat: checked cells, see `flatten`.
        facts: what is known about them.
        n_other: number of other rows.

    Raises:
        UnsupportedError: if there is not enough memory.
    """
    sets = facts.lead_b * facts.lead_h
    made, sizes = library().transpose(cells_argument(flat, facts), sets, n_other, torch.get_num_threads())
    if made is None:
        raise UnsupportedError("backend 'cpu': there is no memory left to exchange queries and keys.")
    cells, own, runs, words = sizes
    new = Flat(
        torch.empty(sets + 1, dtype=torch.int64),
        torch.empty(cells + 1, dtype=torch.int64),
        torch.empty(own, dtype=torch.int32),
        torch.empty(cells + 1, dtype=torch.int64),
        torch.empty(runs, 2, dtype=torch.int32),
        torch.empty(cells, dtype=torch.int64),
        torch.empty(words, dtype=torch.int64),
    )
    library().handle.fv_transpose_take(made, *(x.data_ptr() for x in new))
    per_set = new.set_ptr.diff()
    # Every new own row is there once, so that they cover a set when there are as many as rows.
    covers = own == sets * n_other
    return new, Facts(facts.lead_b, facts.lead_h, int(covers), int(per_set.max()) if sets else 0)
