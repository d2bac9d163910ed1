"""The record of a recall study: plain dataclasses that turn into JSON values and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

from foveate.core.errors import bad

SCHEMA = "foveate.recall"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate on one layer. Figures are means over batch and heads.

    Attributes:
        layer: name of the layer, "" when there is one only.
        family, candidate, kind: what was tried; kind is "static" or "content".
        pairs: share of the N x N pairs that are kept.
        computed: share of the N x N pairs that lie in the cells a kernel computes.
        choosing: FLOPs of making the choice over those of all products q.k; 0 for static candidates.
        mass: share of the full softmax's mass on the kept pairs, mean over queries.
        mass_worst_decile: the share that nine in ten queries exceed.
        error: relative L2 distance of the output to full attention's.
        oracle: the most mass that as many pairs of every query can have, mean over queries.
        random: the mass that as many pairs drawn at random have on average.
        heads: the figures pairs, mass, mass_worst_decile, error and oracle head by head.
    """

    layer: str
    family: str
    candidate: str
    kind: str
    pairs: float
    computed: float
    choosing: float
    mass: float
    mass_worst_decile: float
    error: float
    oracle: float
    random: float
    heads: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The best, or a random, choice of equally many pairs for every query, on one layer.

    Attributes:
        layer: name of the layer.
        rule: "oracle" or "random".
        pairs, mass, mass_worst_decile, error: as in `Row`.
    """

    layer: str
    rule: str
    pairs: float
    mass: float
    mass_worst_decile: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A whole study; `to_dict` and `from_dict` are inverse.

    Attributes:
        settings: sizes and options: tokens, heads, head_dim, layers, grid, causal, queries, budgets, seed.
        rows: one per layer and candidate.
        references: oracle and random choices, one per layer and budget.
        refused: families, or candidates, that could not serve the setting, and why.
    """

    settings: dict[str, Any]
    rows: list[Row]
    references: list[Reference]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the layers in order."""
        return list(dict.fromkeys(row.layer for row in self.references))

    def mean(self) -> Recall:
        """Return the same study with one row per candidate and budget: means over layers."""
        rows = _grouped(self.rows, ("family", "candidate", "kind"))
        kept = [_average(Row, group, layer="", heads={}) for group in rows]
        places = _grouped(self.references, ("rule",))
        # References stand in the order of budgets on every layer.
        each = len(self.layers) or 1
        lines = [_average(Reference, rule[i :: len(rule) // each], layer="") for rule in places
                 for i in range(len(rule) // each)]  # fmt: skip
        return Recall(settings=self.settings, rows=kept, references=lines, refused=self.refused)

    def frontier(self) -> set[tuple[str, str]]:
        """Return (layer, candidate) of the rows that capture more mass than any that computes no more pairs."""
        best: set[tuple[str, str]] = set()
        for layer in dict.fromkeys(row.layer for row in self.rows):
            mass = 0.0
            rows = [row for row in self.rows if row.layer == layer]
            for row in sorted(rows, key=lambda row: (row.computed, -row.mass)):
                if row.mass > mass:
                    mass = row.mass
                    best.add((layer, row.candidate))
        return best

    def cheapest(self, mass: float) -> dict[str, Row]:
        """Return, per family, the row with fewest computed pairs that captures at least `mass`.

        Families that never do are missing. Use it on one layer, or on `mean()`.
        """
        found: dict[str, Row] = {}
        for row in sorted(self.rows, key=lambda row: row.computed):
            if row.mass >= mass:
                found.setdefault(row.family, row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recall:
        """Rebuild from `to_dict`'s value; further entries of the document are left out.

        Raises:
            ArgumentError: if it is not such a document, or of a newer version.
        """
        if data.get("schema") != SCHEMA or data.get("schema_version", 0) > SCHEMA_VERSION:
            got = (data.get("schema"), data.get("schema_version"))
            raise bad("schema", got, f"{SCHEMA} of version {SCHEMA_VERSION} or older")
        return cls(
            settings=data["settings"],
            rows=[Row(**row) for row in data["rows"]],
            references=[Reference(**line) for line in data["references"]],
            refused=data["refused"],
        )


def _grouped(records: Iterable[Any], names: tuple[str, ...]) -> list[list[Any]]:
    found: dict[tuple, list[Any]] = {}
    for record in records:
        found.setdefault(tuple(getattr(record, name) for name in names), []).append(record)
    return list(found.values())


def _average(kind: type, group: list[Any], **given: Any) -> Any:
    """Average the numbers of a group; texts are those of its first record."""
    values = {f.name: getattr(group[0], f.name) for f in fields(kind)}
    means = {n: fmean(getattr(r, n) for r in group) for n, x in values.items() if isinstance(x, float)}
    return kind(**{**values, **means, **given})
