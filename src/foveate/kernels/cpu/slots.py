"""Cells that each run the rule over their own keys: every place of a query in a cell becomes a row of its own.

The core knows one rule over all keys of a query. A query that stands in several cells, whose outputs are then summed,
averaged or weighted, is therefore copied, once for every place it has, and the copies' outputs are combined after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.kernels.combine import combine_cells
from foveate.kernels.cpu.terms import Terms
from foveate.kernels.problem import Problem
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Schedule
from foveate.scores.bias import KeyBias
from foveate.scores.pairs import look_up
from foveate.scores.temperature import RowFactor, SoftCap


class Slots(NamedTuple):
    """The places of queries in cells.

    Attributes:
        ids: per group of cells, the query in every place, -1 where there is none.
        schedule: the same cells over places instead of queries, each place in one cell.
    """

    ids: tuple[Int[Tensor, "b h c tq"], ...]
    schedule: Schedule

    @classmethod
    def of(cls, schedule: Schedule) -> Slots:
        """Return the places of a schedule, kept with it."""
        return schedule.memo("cpu slots", lambda: cls._made(schedule))

    @classmethod
    def _made(cls, schedule: Schedule) -> Slots:
        ids, groups, first = [], [], 0
        for group in schedule.groups:
            queries = group.q_ids()
            places = torch.arange(first, first + group.n_cells * group.tq).view(1, 1, group.n_cells, group.tq)
            first += places.numel()
            ids.append(queries)
            groups.append(ExplicitGroup(torch.where(queries >= 0, places, -1), group.k_ids(), group.mask()))
        return cls(tuple(ids), Schedule(first, schedule.n_k, tuple(groups)))

    def rows(self, x: Float[Tensor, "b h nq d"]) -> Float[Tensor, "b h slots d"]:
        """Return the row of every place; zeros and -1 ids read row 0, which nobody looks at."""
        b, h = (max(n, m) for n, m in zip(x.shape[:2], self.schedule.leading, strict=True))
        x = x.expand(b, h, -1, -1)
        return torch.cat([look_up(x, ids.clamp_min(0)).flatten(2, 3) for ids in self.ids], dim=2)

    def terms(self, read: Terms) -> Terms:
        """Return the terms of a problem over places. Cells that heads tell apart have codes without queries."""
        factor = (
            read.factor if read.factor is None else self.rows(read.factor.unsqueeze(-1))[..., 0].contiguous()
        )
        found = []
        for term in read.terms:
            if self.schedule.leading == (1, 1):
                codes = torch.cat([term.q_code[ids.clamp_min(0).flatten()] for ids in self.ids])
            else:
                codes = term.q_code[:1].expand(self.schedule.n_q).contiguous()
            found.append(term._replace(q_code=codes))
        return read._replace(factor=factor, terms=found)

    def combine(self, out: Float[Tensor, "b h slots dv"], problem: Problem) -> Float[Tensor, "b h nq dv"]:
        """Bring the outputs of places back to their queries, in the dtype of `out`."""
        parts = out.to(problem.accumulate).split([ids.shape[2] * ids.shape[3] for ids in self.ids], dim=2)
        outs = [part.unflatten(2, ids.shape[2:]) for part, ids in zip(parts, self.ids, strict=True)]
        shape = (problem.batch, problem.heads, problem.n_q, problem.d_v)
        return combine_cells(outs, self.ids, problem.combine, shape, outs[0]).to(out.dtype)


def refuse(problem: Problem) -> str | None:
    """Say why places cannot stand for queries, None if they can. Reads no tensor."""
    schedule = problem.schedule
    if schedule is None or not schedule.groups:
        return f"there are no cells that combine by {problem.combine!r}"
    if problem.return_lse:
        return f"cells combine by {problem.combine!r} and have a row sum each"
    if schedule.leading == (1, 1):
        return None
    told = [type(part).__name__ for part in problem.score if type(part) not in (KeyBias, RowFactor, SoftCap)]
    told += ["the mask"] if problem.mask is not None and problem.mask.shape[2] > 1 else []
    if told:
        return f"cells of single heads combine by {problem.combine!r}, where the core cannot follow {told[0]}"
    return None
