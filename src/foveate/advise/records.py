"""The records of a race: plain dataclasses that turn into JSON values and back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["waiting", "running", "eliminated", "finished", "failed", "refused", "interrupted"]

STATUSES = ("waiting", "running", "eliminated", "finished", "failed", "refused", "interrupted")


@dataclass
class CurvePoint:
    """One held-out evaluation of one seed.

    Attributes:
        seed: which seed.
        step: optimiser steps done.
        seconds: training time spent until then by this seed (evaluations excluded).
        quality: headline metric over the test examples.
        quality_se: its standard error over the test examples.
        parts: the questions that make up the headline.
        loss: mean training loss since the previous evaluation.
    """

    seed: int
    step: int
    seconds: float
    quality: float
    quality_se: float
    parts: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan


@dataclass
class MechanismResult:
    """What a race knows about one mechanism.

    Attributes:
        key: the mechanism.
        status: "waiting" and "running" while the race goes on; "eliminated" left out of a later rung;
            "finished" trained to the end; "failed" raised (see `reason`); "refused" cannot do the workload;
            "interrupted" cut short by the user.
        reason: why it failed or was refused, or which rung it left in.
        params: trained parameters of the network; `mixer_params`: those inside the mixers.
        steps: optimiser steps all its counted seeds have done.
        seeds: seeds that have done `steps`.
        seconds: training time of one seed for `steps`, mean over seeds.
        step_seconds: median seconds of one optimiser step, the batch included.
        quality, quality_se: mean over seeds at `steps`, with the error over test examples and seeds.
        parts: means of the parts at `steps`.
        curve: every evaluation.
    """

    key: str
    status: Status = "waiting"
    reason: str = ""
    params: int = 0
    mixer_params: int = 0
    steps: int = 0
    seeds: list[int] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = math.nan
    quality: float = math.nan
    quality_se: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)

    def at(self, step: int) -> list[CurvePoint]:
        """The evaluations made after exactly `step` steps, one per seed."""
        return [point for point in self.curve if point.step == step]

    @property
    def measured(self) -> bool:
        """Whether there is a quality to show."""
        return not math.isnan(self.quality)


@dataclass
class RaceResult:
    """A whole race; `to_dict` and `from_dict` are inverse, so that a race can be stored and gone on with.

    Attributes:
        workload: its key; `options`: its options.
        metric, higher_is_better: of the headline.
        baselines: quality of trivial answers by name; `floor_name`, `floor`: the best of them.
        budget_s: seconds allowed; `spent_s`: seconds used, evaluations and set-up included.
        rungs: step counts at which the field was cut, the last one being the finalists' end.
        seeds: seeds asked for finalists.
        seed_sd: spread between seeds, pooled over mechanisms with two or more; NaN when there are none.
        complete: whether the race ran to its end (False after an interruption).
        mechanisms: one record per mechanism, in the order given.
    """

    workload: str
    options: dict[str, Any]
    metric: str
    higher_is_better: bool
    baselines: dict[str, float]
    floor_name: str
    floor: float
    budget_s: float
    seeds: int
    spent_s: float = 0.0
    rungs: list[int] = field(default_factory=list)
    seed_sd: float = math.nan
    complete: bool = False
    mechanisms: dict[str, MechanismResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes None."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RaceResult:
        """Rebuild from `to_dict`'s value."""
        data = dict(data)
        rows = {}
        for key, row in data.pop("mechanisms").items():
            row = dict(row)
            curve = [CurvePoint(**_filled(CurvePoint, point)) for point in row.pop("curve")]
            rows[key] = MechanismResult(**_filled(MechanismResult, row), curve=curve)
        return cls(**_filled(cls, data), mechanisms=rows)


def _plain(value: Any) -> Any:
    """NaN and infinities have no place in JSON: they become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _filled(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Keep known fields; None in a float field means NaN."""
    floats = {name for name, f in cls.__dataclass_fields__.items() if f.type == "float"}
    known = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
    return {name: math.nan if value is None and name in floats else value for name, value in known.items()}
