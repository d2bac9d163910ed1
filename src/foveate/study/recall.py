"""`recall`: how much of full attention's mass does a pattern or a router capture, for how many pairs?

For queries, keys and values (random, of a real model, one's own) every candidate chooses pairs. What is
reported is the share of the full softmax that falls on them, the error of the output, and the pairs computed,
beside two references: the best choice of as many pairs per query, and a random one. Nothing is N x N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import FoveateError, bad
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.flops import FlopCounter
from foveate.patterns.lower import lower
from foveate.study.candidates import BUDGETS, Candidate, Router, Setting, candidates
from foveate.study.maps import Maps
from foveate.study.mass import Rows, blocks, rows_of, spaced
from foveate.study.records import Recall, Reference, Row

_QUERIES = 512
# Where the oracle's line is drawn, besides the budgets.
_REFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
# Weights of full attention that are kept while candidates take turns: 128 MB, and as much for their sums.
_KEPT = 1 << 25


def recall(
    maps: Maps | Sequence[Maps],
    *,
    grid: Grid | int | Sequence[int] | None = None,
    causal: bool = False,
    budgets: Sequence[float] = BUDGETS,
    only: Sequence[str] | None = None,
    routers: Mapping[str, Router] | None = None,
    queries: int | None = None,
    seed: int = 0,
    listener: Callable[[str], None] | None = None,
) -> Recall:
    """Measure what candidates capture of full attention.

    Args:
        maps: q, k, v of one layer, or of several with equally many tokens.
        grid: geometry of the tokens; a sequence by default.
        causal: whether no query sees a key after it, in full attention and in every candidate.
        budgets: shares of the N x N pairs the candidates are asked to spend.
        only: names of families, or shell patterns over them; all that are registered by default.
        routers: functions `(q, k) -> Pattern | Selection` of one's own, by name, beside the families.
        queries: figures are taken on so many queries of each head, spread over all, and the choice is made
            for all; by default at most 512, fewer where heads and tokens are many.
        seed: of the random choices.
        listener: told what is worked on, a phrase at a time.

    Raises:
        ArgumentError: naming the argument that does not fit.
        UnknownNameError: for a name in `only` that no family has.
    """
    layers = [maps] if isinstance(maps, Maps) else list(maps)
    if not layers:
        raise bad("maps", maps, "q, k, v of at least one layer")
    n = layers[0].n
    if any(layer.n != n for layer in layers):
        raise bad("maps", [layer.n for layer in layers], "equally many tokens in every layer")
    if len({layer.name for layer in layers}) != len(layers):
        raise bad("maps", [layer.name for layer in layers], "a name of its own for every layer")
    if queries is not None and queries < 1:
        raise bad("queries", queries, "a positive integer")
    each = layers[0].q.shape[0] * layers[0].q.shape[1] * n
    q_ids = spaced(n, queries or max(32, min(_QUERIES, _KEPT // each)))
    setting = Setting(
        n=n, grid=Grid(n) if grid is None else Grid.of(grid), causal=causal, budgets=tuple(budgets)
    )
    tried, refused = candidates(setting, only)
    for name, choose in (routers or {}).items():
        tried.append(Candidate(name, name, "content", choose))
    rows: list[Row] = []
    references: list[Reference] = []
    with torch.no_grad():
        for layer in layers:
            study = _Layer(layer.spread(), setting, q_ids)
            references += study.references(torch.Generator().manual_seed(seed))
            for candidate in tried:
                if listener is not None:
                    listener(f"{layer.name} {candidate.label}".strip())
                try:
                    rows.append(study.row(candidate))
                except FoveateError as error:
                    refused[candidate.label] = str(error)
    settings = {
        "tokens": n,
        "grid": list(setting.grid),
        "causal": causal,
        "layers": [layer.name for layer in layers],
        "batch": layers[0].q.shape[0],
        "heads": layers[0].q.shape[1],
        "head_dim": layers[0].q.shape[3],
        "queries": len(q_ids),
        "budgets": list(setting.budgets),
        "seed": seed,
    }
    return Recall(settings=settings, rows=rows, references=references, refused=refused)


class _Tally:
    """What one choice of pairs amounts to, gathered over blocks of queries."""

    def __init__(self):
        self.parts: list[tuple[Tensor, ...]] = []
        self.wrong: Tensor | float = 0.0
        self.size: Tensor | float = 0.0

    def add(
        self, rows: Rows, mask: Bool[Tensor, "#b #h r n"], output: Float[Tensor, "b h r d"] | None = None
    ) -> None:
        """Take one block; `output` where it is not softmax attention over the pairs of the mask."""
        mass, count, plain = rows.through(mask)
        output = plain if output is None else output
        self.parts.append((mass, count.float(), rows.oracle(count), count / rows.visible))
        self.wrong = self.wrong + (output - rows.full).square().sum((-1, -2))
        self.size = self.size + rows.full.square().sum((-1, -2))

    def figures(self, n: int) -> dict[str, Float[Tensor, "h"]]:
        """Return the figures head by head, means over the batch."""
        mass, count, oracle, random = (torch.cat(part, dim=-1) for part in zip(*self.parts, strict=True))
        assert isinstance(self.wrong, Tensor)
        assert isinstance(self.size, Tensor)
        error = (self.wrong / self.size.clamp(min=torch.finfo(mass.dtype).tiny)).sqrt()
        return {
            "pairs": count.mean((0, 2)) / n,
            "mass": mass.mean((0, 2)),
            "mass_worst_decile": mass.transpose(0, 1).flatten(1).quantile(0.1, dim=1),
            "error": error.mean(0),
            "oracle": oracle.mean((0, 2)),
            "random": random.mean((0, 2)),
        }


class _Layer:
    """The study of one layer."""

    def __init__(self, maps: Maps, setting: Setting, q_ids: Int[Tensor, "r"]):
        self.maps, self.setting, self.q_ids = maps, setting, q_ids.to(maps.q.device)
        size = len(q_ids) * maps.q.shape[0] * maps.q.shape[1] * setting.n
        # Full attention of the queries is worked out once where it can be kept, else for every candidate.
        self.kept = list(self._worked_out()) if size <= _KEPT else None

    def _worked_out(self) -> Iterator[Rows]:
        return blocks(self.maps, self.q_ids, causal=self.setting.causal)

    def rows(self) -> Iterable[Rows]:
        """Full attention, block by block."""
        return self._worked_out() if self.kept is None else self.kept

    def references(self, generator: torch.Generator) -> list[Reference]:
        """Measure the best and a random choice at every budget."""
        shares = sorted({*_REFERENCES, *self.setting.budgets})
        sizes = list(dict.fromkeys(self.setting.keys(share) for share in shares))
        lines = {(rule, keys): _Tally() for rule in ("oracle", "random") for keys in sizes}
        for rows in self.rows():
            for wanted, ranks in (("oracle", rows.ranks()), ("random", rows.ranks(generator))):
                for (rule, keys), tally in lines.items():
                    if rule == wanted:
                        tally.add(rows, ranks < keys)
        return [
            Reference(layer=self.maps.name, rule=rule, **_means(tally.figures(self.setting.n), Reference))
            for (rule, _), tally in lines.items()
        ]

    def row(self, candidate: Candidate) -> Row:
        """Measure one candidate."""
        q, k, v, n = self.maps.q, self.maps.k, self.maps.v, self.setting.n
        with FlopCounter() as counter:
            where = candidate.where(q, k, causal=self.setting.causal)
        schedule = lower(where, n, n)
        output = None
        if getattr(where, "combine", "lse") != "lse":
            # Cells that combine otherwise are no softmax over the kept pairs.
            output = attend(q, k, v, where=where)[:, :, self.q_ids]
        tally = _Tally()
        for rows in self.rows():
            mask = rows_of(where, rows.q_ids, n)
            part = slice(rows.first, rows.first + len(rows.q_ids))
            tally.add(rows, mask, None if output is None else output[:, :, part])
        figures = tally.figures(n)
        shown = ("pairs", "mass", "mass_worst_decile", "error", "oracle")
        return Row(
            layer=self.maps.name,
            family=candidate.family,
            candidate=candidate.label,
            kind=candidate.kind,
            computed=schedule.pairs_computed / max(schedule.pairs_dense, 1),
            choosing=counter.get_total_flops() / (2 * q.shape[0] * q.shape[1] * n * n * q.shape[3]),
            heads={name: [round(x, 6) for x in figures[name].tolist()] for name in shown},
            **_means(figures, Row),
        )


def _means(figures: dict[str, Tensor], kind: type) -> dict[str, float]:
    """Means over heads of the figures a record has."""
    return {name: float(x.mean()) for name, x in figures.items() if name in kind.__dataclass_fields__}
