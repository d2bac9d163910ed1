"""The schema of results.json: one table of fields, from which validation and the documentation are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCHEMA = "foveate.results"
SCHEMA_VERSION = 1
STATUSES = ("measured", "refused", "failed")
RUN_STATES = ("running", "complete", "interrupted")


@dataclass(frozen=True)
class Field:
    """One field: `kind` is "string", "number", "integer", "boolean", "object" or "array"."""

    name: str
    kind: str
    meaning: str
    unit: str = ""
    required: bool = False
    nullable: bool = True
    minimum: float | None = None
    choices: tuple[str, ...] = ()


DOCUMENT = (
    Field("schema", "string", f'always "{SCHEMA}"', required=True, nullable=False, choices=(SCHEMA,)),
    Field("schema_version", "integer", "rises when a field changes its meaning or goes away", required=True,
          nullable=False, minimum=1),
    Field("created", "string", "when the run began, ISO 8601 with offset", required=True, nullable=False),
    Field("updated", "string", "when the file was last written", required=True, nullable=False),
    Field("status", "string", "state of the run; a file left at `running` was killed and can be resumed",
          required=True, nullable=False, choices=RUN_STATES),
    Field("fingerprint", "object", "machine and software: cpu, isa, threads, ram_bytes, gpu, versions",
          required=True, nullable=False),
    Field("settings", "object", "what was asked for: workloads, budget, device, dtype, shape, seed ...",
          required=True, nullable=False),
    Field("workloads", "object", "per workload: title, metric, higher_is_better, baselines, grid ...",
          required=True, nullable=False),
    Field("rows", "array", "one row per workload and mechanism, see below", required=True, nullable=False),
    Field("races", "object", "per learning workload: the whole race with every evaluation, for `--resume`"),
    Field("recommendations", "array", "ranked choices with their reasons, the headline first"),
)  # fmt: skip

_MS = {"unit": "ms", "minimum": 0.0}

ROW = (
    Field("workload", "string", "image, restore, text, recall, shapes", required=True, nullable=False),
    Field("mechanism", "string", "key in the registry", required=True, nullable=False),
    Field("status", "string", "measured: figures below; refused: cannot do this workload; failed: raised, or "
          "its correctness gate is red", required=True, nullable=False, choices=STATUSES),
    Field("reason", "string", "why refused or failed, otherwise empty", required=True, nullable=False),
    Field("forward_ms", "number", "median time of an inference forward pass: of the mechanism alone in `shapes`, "
          "of the whole network on one training batch elsewhere", required=True, **_MS),
    Field("backward_ms", "number", "median time of the backward pass alone", required=True, **_MS),
    Field("memory_bytes", "integer", "peak memory of one forward and backward pass", unit="bytes", required=True,
          minimum=0),
    Field("quality", "number", "headline metric of the workload on held-out data, mean over seeds",
          required=True),
    Field("quality_se", "number", "standard error of `quality` over test examples and seeds", required=True,
          minimum=0),
    Field("forward_spread_ms", "number", "interquartile range of the forward time", **_MS),
    Field("backward_spread_ms", "number", "interquartile range of the backward time", **_MS),
    Field("repeats", "integer", "timed rounds", minimum=1),
    Field("step_ms", "number", "forward plus backward", **_MS),
    Field("params", "integer", "trained parameters: of the mechanism in `shapes`, of the network elsewhere",
          minimum=0),
    Field("mixer_params", "integer", "of which inside the mechanism", minimum=0),
    Field("flops", "integer", "floating point operations of one forward pass, counted", minimum=0),
    Field("speedup", "number", "full attention's forward plus backward time over this one's", minimum=0),
    Field("speedup_forward", "number", "full attention's forward time over this one's", minimum=0),
    Field("speedup_bound", "number", "full attention's FLOPs over this one's: what the arithmetic alone would allow",
          minimum=0),
    Field("predicted_ms", "number", "full attention's forward time divided by `speedup_bound`", **_MS),
    Field("backends", "array", "`shapes`: backends of `attend` that its forward pass ran on, as text"),
    Field("core_gain", "number", "`shapes`: forward time on backend `tiles` (plain torch) over this one's, where it "
          "ran on the C++ core", minimum=0),
    Field("state_bytes", "integer", "bytes that decoding keeps of one sample: in causal workloads of all layers after "
          "the workload's whole length, in `shapes` of one layer that scans, at any length; null where it has no "
          "`prefill` and `step`, or looks both ways", unit="bytes", minimum=0),
    Field("memory_ratio", "number", "this one's peak memory over full attention's", minimum=0),
    Field("exactness_error", "number", "relative L2 distance to full attention's output with the same parameters and "
          "zeros in what it adds; null where it lacks them or has another layout", minimum=0),
    Field("gate", "object", "correctness gate: ok, and checks with name, ok, value, limit, sentence"),
    Field("exponent", "number", "p in time ~ N^p, forward plus backward, over the largest sizes"),
    Field("exponent_se", "number", "its standard error", minimum=0),
    Field("points", "array", "`shapes`: per size grid, tokens, forward_ms, backward_ms, spreads, memory_bytes, "
          "flops, speedup, speedup_bound"),
    Field("slower_than_dense", "array", "`shapes`: sizes at which forward plus backward is slower than full "
          "attention's, as text"),
    Field("flops_per_token", "number", "`shapes`: of one layer that scans, forward, at any length; null where its "
          "scans cannot be counted", minimum=0),
    Field("crossover_predicted", "integer", "`shapes`: tokens from which full attention takes more FLOPs than a layer "
          "that scans; null where its scans cannot be counted", minimum=1),
    Field("crossover_measured", "number", "`shapes`: tokens from which a layer that scans is faster than full "
          "attention, forward plus backward, interpolated between the sizes; null where no two sizes enclose it",
          minimum=1),
    Field("quality_at_equal_time", "number", "quality when the seconds of the fastest finisher were spent"),
    Field("resolved", "boolean", "whether `quality` beats the trivial baseline by more than the noise"),
    Field("rank", "integer", "place by quality among resolved rows; those within the noise share one", minimum=1),
    Field("tied_with", "array", "mechanisms that cannot be told apart from this one in this budget"),
    Field("parts", "object", "quality of the single questions of the workload"),
    Field("steps", "integer", "optimiser steps of every counted seed", minimum=0),
    Field("seeds", "integer", "number of seeds counted", minimum=0),
    Field("train_seconds", "number", "training time of one seed", unit="s", minimum=0),
    Field("eliminated", "string", "at which point of the race it was left behind, or empty"),
    Field("curve", "array", "evaluations: [step, seconds, quality] averaged over seeds"),
    Field("family", "string", "from the registry"),
    Field("fidelity", "string", "from the registry; `reconstruction` is never recommended"),
    Field("paper", "string", "from the registry"),
    Field("cost", "string", "asymptotic cost from the registry"),
    Field("reach", "object", "picture: grid, and one level 0-9 per token of who influences the middle token"),
)  # fmt: skip

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


def _problems(fields: tuple[Field, ...], value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected an object, got {type(value).__name__}"
        return
    known = {field.name for field in fields}
    for name in value:
        if name not in known:
            yield f"{where}.{name}: not a field of schema version {SCHEMA_VERSION}"
    for field in fields:
        at = f"{where}.{field.name}"
        if field.name not in value:
            if field.required:
                yield f"{at}: missing"
            continue
        got = value[field.name]
        if got is None:
            if not field.nullable:
                yield f"{at}: may not be null"
            continue
        wrong_bool = isinstance(got, bool) and field.kind != "boolean"
        if wrong_bool or not isinstance(got, _KINDS[field.kind]):
            yield f"{at}: expected {field.kind}, got {got!r}"
        elif isinstance(got, float) and not math.isfinite(got):
            yield f"{at}: {got} is not a JSON number"
        elif field.choices and got not in field.choices:
            yield f"{at}: expected one of {', '.join(field.choices)}, got {got!r}"
        elif field.minimum is not None and got < field.minimum:
            yield f"{at}: expected at least {field.minimum:g}, got {got!r}"


def validate(document: Any) -> list[str]:
    """Return what is wrong with a parsed results.json, one sentence each; empty when nothing is.

    Beyond types and ranges: a measured row has times or a quality, any other has a reason and no figures,
    and no two rows are of one workload and mechanism.
    """
    found = list(_problems(DOCUMENT, document, "results"))
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        return found
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        found.append(
            f"results.schema_version: {version} is newer than {SCHEMA_VERSION}, which this version reads"
        )
    seen: set[tuple[Any, Any]] = set()
    for i, row in enumerate(document["rows"]):
        where = f"rows[{i}]"
        found += _problems(ROW, row, where)
        if not isinstance(row, dict):
            continue
        name = (row.get("workload"), row.get("mechanism"))
        if name in seen:
            found.append(f"{where}: a second row of {name[0]} and {name[1]}")
        seen.add(name)
        figures = [row.get(f) for f in ("forward_ms", "backward_ms", "memory_bytes", "quality")]
        if row.get("status") == "measured" and all(figure is None for figure in figures):
            found.append(f"{where}: measured, but without any figure")
        if row.get("status") in ("refused", "failed"):
            if not row.get("reason"):
                found.append(f"{where}: {row['status']} without a reason")
            if any(figure is not None for figure in figures):
                found.append(f"{where}: {row['status']}, but with figures")
        gate = row.get("gate")
        if row.get("status") == "measured" and isinstance(gate, dict) and not gate.get("ok"):
            found.append(f"{where}: measured although its correctness gate is red")
    return found


def markdown() -> str:
    """The tables of docs/results-schema.md."""

    def table(fields: tuple[Field, ...]) -> str:
        lines = ["| field | type | meaning |", "|---|---|---|"]
        for field in fields:
            kind = field.kind + (f" ({field.unit})" if field.unit else "")
            kind += "" if field.required else ", optional"
            kind += " or null" if field.nullable and field.required else ""
            meaning = field.meaning.replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {meaning} |")
        return "\n".join(lines)

    return f"## The document\n\n{table(DOCUMENT)}\n\n## A row\n\n{table(ROW)}\n"
