"""Workloads with learning: race the mechanisms, then time the networks they raced in, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.advise.admit import Admission, one_line
from foveate.advise.events import Event, Listener
from foveate.advise.race import RaceEvent, race
from foveate.advise.ranking import Scored, quality_at, standings
from foveate.advise.records import MechanismResult, RaceResult
from foveate.advise.settings import BASELINE, Settings
from foveate.advise.shapes import add_ratios
from foveate.cost.state import decoding_bytes
from foveate.kernels.flops import count_flops
from foveate.measure.memory import peak_bytes
from foveate.measure.store import empty_row
from foveate.measure.timer import Timed, time_interleaved
from foveate.models.backbone import Backbone, build
from foveate.tasks.workload import Workload

# Share of a learning workload's time that is kept for timing the networks after the race.
TIMING_SHARE = 0.1


def describe_race(workload: Workload, result: RaceResult) -> dict[str, Any]:
    """The workload's record in results.json."""
    spec = workload.spec
    return {
        "title": workload.title,
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "baselines": result.baselines,
        "floor_name": result.floor_name,
        "floor": result.floor,
        "grid": list(spec.grid.sizes),
        "dim": spec.dim,
        "heads": spec.heads,
        "depth": spec.depth,
        "causal": spec.causal,
        "batch": workload.recipe.batch_size,
        "rungs": result.rungs,
        "seed_sd": result.seed_sd,
        "spent_s": result.spent_s,
        "complete": result.complete,
        "equal_time_s": equal_time(result),
        "options": result.options,
    }


def run_race(
    workload: Workload,
    admissions: list[Admission],
    settings: Settings,
    *,
    budget_s: float,
    emit: Listener,
    save: Callable[[RaceResult], None],
    resume: RaceResult | None,
    checkpoints: Path | None,
) -> RaceResult:
    """Race those admitted, telling `emit` what happens and keeping the state through `save`."""
    key = workload.key

    def hear(event: RaceEvent) -> None:
        who = f"{event.key}: " if event.key and not event.message.startswith(event.key) else ""
        message = f"{who}{event.message}" if event.message else ""
        emit(Event("progress", key, min(event.fraction, 1.0), message))
        if event.kind in ("rung", "eliminated") and message:
            emit(Event("note", key, event.fraction, message))
        # A failure or refusal is told by its row; a progress event that carries a record is an evaluation.
        if event.race is not None and (event.kind != "progress" or event.result is not None):
            save(event.race)

    result = race(
        workload,
        [a.facts.key for a in admissions],
        budget_s=budget_s,
        seeds=settings.seeds,
        on_event=hear,
        device=settings.device,
        dtype=settings.torch_dtype,
        resume=resume,
        checkpoints=checkpoints,
    )
    save(result)
    return result


def _curve(record: MechanismResult) -> list[list[float]]:
    """Evaluations averaged over the seeds that made them: [step, seconds, quality]."""
    out = []
    for step in sorted({point.step for point in record.curve}):
        points = record.at(step)
        seconds = sum(p.seconds for p in points) / len(points)
        out.append([step, seconds, sum(p.quality for p in points) / len(points)])
    return out


def equal_time(result: RaceResult) -> float:
    """Seconds of training that every measured mechanism has spent, NaN without any."""
    ends = [max(p.seconds for p in r.curve) for r in result.mechanisms.values() if r.measured and r.curve]
    return min(ends, default=math.nan)


def _verdicts(result: RaceResult) -> dict[str, dict[str, Any]]:
    """Row fields on what the noise allows to be said of every measured mechanism."""
    scores = [
        Scored(r.key, r.quality, r.quality_se, r.steps) for r in result.mechanisms.values() if r.measured
    ]
    found = standings(scores, result.floor, higher_is_better=result.higher_is_better)
    return {
        key: {"resolved": s.resolved, "rank": s.rank, "tied_with": s.tied_with} for key, s in found.items()
    }


def rows_of(workload: str, result: RaceResult, admissions: list[Admission]) -> list[dict[str, Any]]:
    """One row per raced mechanism; times are still missing."""
    verdicts = _verdicts(result)
    equal = equal_time(result)
    rows = []
    for admission in admissions:
        key, said = admission.facts.key, admission.facts_row
        record = result.mechanisms.get(key)
        if record is None:
            continue
        if record.status in ("failed", "refused"):
            rows.append(empty_row(workload, key, record.status, record.reason or "no reason given", **said))
        elif not record.measured:
            rows.append(
                empty_row(workload, key, "failed", "the run ended before its first evaluation", **said)
            )
        else:
            curve = _curve(record)
            row = empty_row(workload, key, "measured", **said) | {
                "quality": record.quality,
                "quality_se": record.quality_se,
                "parts": record.parts,
                "steps": record.steps,
                "seeds": len(record.seeds),
                "train_seconds": record.seconds,
                "eliminated": record.reason if record.status == "eliminated" else "",
                "params": record.params,
                "mixer_params": record.mixer_params,
                "curve": curve,
                "quality_at_equal_time": quality_at([(s, q) for _, s, q in curve], equal),
            }
            rows.append(row | verdicts.get(key, {}))
    return rows


def _calls(model: Backbone, workload: Workload, batch: Any) -> tuple[Timed, Timed]:
    """Inference forward pass, and backward pass alone, of a network on one training batch."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(batch.inputs)

    def prepare() -> Tensor:
        model.zero_grad(set_to_none=True)
        return workload.loss(model(batch.inputs), batch)

    return Timed(forward), Timed(lambda loss: loss.backward(), prepare)


def time_networks(
    workload: Workload,
    rows: list[dict[str, Any]],
    settings: Settings,
    *,
    budget_s: float,
    emit: Listener,
) -> None:
    """Fill times, memory, state and FLOPs of measured rows, all networks timed in turn on one training batch.

    A network that raises becomes a failed row, in place.
    """
    key = workload.key
    batch = workload.batch(0, seed=settings.seed).to(settings.device, settings.torch_dtype)
    live = {row["mechanism"]: row for row in rows if row["status"] == "measured"}
    calls: dict[str, Timed] = {}
    models: dict[str, Backbone] = {}
    faults: dict[str, Exception] = {}
    for name in live:
        try:
            model = build(name, workload.spec, seed=settings.seed)
            models[name] = model.to(settings.device, settings.torch_dtype)
        except Exception as error:
            faults[name] = error
            continue
        calls[f"{name}/forward"], calls[f"{name}/backward"] = _calls(models[name], workload, batch)

    def tick(*_: int) -> None:
        emit(Event("progress", key, 0.97, "timing the networks side by side"))

    tick()
    found = time_interleaved(
        calls, min_repeats=3, max_repeats=9, budget_s=budget_s, device=settings.device, on_round=tick
    )
    for name, model in models.items():
        try:
            forward, backward = _calls(model, workload, batch)

            def step(backward: Timed = backward) -> None:
                assert backward.prepare is not None
                backward.run(backward.prepare())

            for which in ("forward", "backward"):
                if f"{name}/{which}" in found.errors:
                    raise found.errors[f"{name}/{which}"]
            row, timing = live[name], found.times[f"{name}/forward"]
            back = found.times[f"{name}/backward"]
            row |= {
                "forward_ms": timing.median_ms,
                "forward_spread_ms": timing.spread_ms,
                "backward_ms": back.median_ms,
                "backward_spread_ms": back.spread_ms,
                "step_ms": timing.median_ms + back.median_ms,
                "repeats": timing.repeats,
                "flops": count_flops(forward.run),
                "memory_bytes": peak_bytes(step, device=settings.device),
                "state_bytes": decoding_bytes(model),
            }
            model.zero_grad(set_to_none=True)
        except Exception as error:
            faults[name] = error
    for name, error in faults.items():
        said = {k: live[name].get(k) for k in ("family", "fidelity", "paper", "cost", "gate", "reach")}
        reason = f"timing it raised {one_line(error)}"
        rows[rows.index(live[name])] = empty_row(key, name, "failed", reason, **said)
    dense = live.get(BASELINE) if BASELINE not in faults else None
    for row in rows:
        if row["status"] == "measured":
            add_ratios(row, dense)
