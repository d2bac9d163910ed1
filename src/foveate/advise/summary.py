"""What a race's curves say of each mechanism: its quality, at which step, of which seeds, with which error."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.advise.ranking import pooled_sd, quality_error
from foveate.advise.records import MechanismResult, RaceResult


def summarise(result: RaceResult, active: Sequence[str]) -> None:
    """Recompute the summaries of all records from their curves.

    Args:
        result: the race; its records' quality, error, steps, seconds, seeds and parts are set.
        active: the mechanisms still in the race: those are compared at a step all of them have, if there is one.
    """
    peers = [result.mechanisms[key] for key in active]
    for record in result.mechanisms.values():
        if record.curve:
            _summarise(record, peers)
    measured = [record for record in result.mechanisms.values() if record.measured]
    result.seed_sd = pooled_sd([p.quality for p in record.at(record.steps)] for record in measured)
    for record in measured:
        errors = [p.quality_se for p in record.at(record.steps)]
        record.quality_se = quality_error(errors, result.seed_sd)


def _summarise(record: MechanismResult, peers: Sequence[MechanismResult]) -> None:
    """Set the quality: at the last step all its seeds have, if possible one that the whole field has."""
    most = max(len(record.at(p.step)) for p in record.curve)
    steps = {p.step for p in record.curve if len(record.at(p.step)) == most}
    if record.status in ("running", "interrupted"):
        common = steps.intersection(*({p.step for p in peer.curve} for peer in peers if peer.curve))
        steps = common or steps
    record.steps = max(steps)
    points = record.at(record.steps)
    record.seeds = sorted(p.seed for p in points)
    record.seconds = sum(p.seconds for p in points) / len(points)
    record.quality = sum(p.quality for p in points) / len(points)
    names = points[0].parts
    record.parts = {name: sum(p.parts[name] for p in points) / len(points) for name in names}
