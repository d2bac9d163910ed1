"""Successive halving over mechanisms: everybody starts, the better half goes on, finalists get more seeds.

A rung is run in rounds. In a round every runner does the same number of steps and is then scored on
held-out data, so that at every moment all are comparable at equal steps. How many steps the next round has is
decided from the step times measured so far and the time that is left: that is how the budget is kept on any
machine. Leaving early costs nothing but rank: the quality measured until then stays.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from foveate.advise.field import MIN_STEPS, field_sizes, fitting, shares
from foveate.advise.ranking import Scored, survivors
from foveate.advise.records import CurvePoint, MechanismResult, RaceResult
from foveate.advise.summary import summarise
from foveate.core.errors import ArgumentError, UnknownNameError, UnsupportedError, bad
from foveate.core.registry import get_system
from foveate.models import backbone
from foveate.models.backbone import Backbone, NetSpec
from foveate.tasks.train import Trainer
from foveate.tasks.workload import Workload

ROUNDS = 2
# Steps that tell how long a step takes, before anything is planned.
CALIBRATION = 3
# A single mechanism may not need more than this share of the first rung for its part of it.
LARGEST_SHARE = 0.5

EventKind = Literal[
    "start", "refused", "failed", "rung", "progress", "eliminated", "finished", "stopped", "end"
]


@dataclass(frozen=True)
class RaceEvent:
    """Something a progress display may want to know.

    Attributes:
        kind: what happened.
        key: the mechanism, or "".
        fraction: share of the race's time that is spent, 0 to 1.
        message: one sentence for people.
        result: the mechanism's record, or None.
        race: the whole record so far; it goes on changing, store `race.to_dict()`.
    """

    kind: EventKind
    key: str = ""
    fraction: float = 0.0
    message: str = ""
    result: MechanismResult | None = None
    race: RaceResult | None = None


def _family(key: str) -> str:
    try:
        return get_system(key).family
    except UnknownNameError:
        return ""  # built by a function of the caller's


class _Stopped(Exception):
    """The user asked to stop."""


@dataclass
class _Runner:
    """One (mechanism, seed) in training."""

    key: str
    seed: int
    trainer: Trainer
    step_seconds: float = math.nan
    eval_seconds: float = 0.0


def race(
    workload: Workload,
    keys: Sequence[str],
    *,
    budget_s: float,
    seeds: int = 3,
    on_event: Callable[[RaceEvent], None] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stop: threading.Event | Callable[[], bool] | None = None,
    resume: RaceResult | None = None,
    checkpoints: Path | None = None,
    build: Callable[..., Backbone] | None = None,
) -> RaceResult:
    """Race mechanisms on a workload for `budget_s` seconds.

    A mechanism that says it cannot serve the workload is "refused" with its message, one that raises anything
    else, or diverges, is "failed" with its reason; the others go on. Ctrl-C or `stop` ends the race at once,
    keeps every evaluation made, and returns a record with `complete=False`.

    Args:
        workload: what to train for.
        keys: the mechanisms.
        budget_s: seconds of wall-clock time for everything, resumed time included.
        seeds: seeds of the finalists.
        on_event: called with every `RaceEvent`, in this thread.
        device, dtype: where and in what to train.
        stop: set, or returning True, when the race should end.
        resume: an earlier, incomplete record of the same race.
        checkpoints: folder for the networks' states; with it a resumed race goes on where it was, without it
            the networks of unfinished rungs are trained again.
        build: `build(key, spec, seed=)`; the registry's by default.

    Raises:
        ArgumentError: no keys, a key twice, a budget or number of seeds that is not positive, a record to
            resume that belongs to another workload.
    """
    keys = list(keys)
    if not keys or len(set(keys)) != len(keys):
        raise bad("keys", keys, "at least one mechanism, none of them twice")
    if not budget_s > 0:
        raise bad("budget_s", budget_s, "a positive number of seconds")
    if seeds < 1:
        raise bad("seeds", seeds, "at least 1")
    if resume is not None and (resume.workload, resume.options) != (workload.key, workload.options()):
        raise bad("resume", resume.workload, f"a record of {workload.key!r} with the same options")
    run = _Race(workload, keys, budget_s, seeds, device, dtype, resume, build or backbone.build)
    run.checkpoints = checkpoints
    run.listen = on_event or (lambda event: None)
    run.stop = (stop.is_set if isinstance(stop, threading.Event) else stop) or (lambda: False)
    return run.run()


class _Race:
    """The state of one race; `race` is its only user."""

    checkpoints: Path | None
    listen: Callable[[RaceEvent], None]
    stop: Callable[[], bool]

    def __init__(self, workload, keys, budget_s, seeds, device, dtype, resume, build):
        self.began = time.perf_counter()
        self.workload: Workload = workload
        self.device, self.dtype, self.build = device, dtype, build
        floor_name, floor = workload.floor()
        self.result = resume or RaceResult(
            workload=workload.key,
            options=workload.options(),
            metric=workload.metric,
            higher_is_better=workload.higher_is_better,
            baselines=workload.baselines(),
            floor_name=floor_name,
            floor=floor,
            budget_s=budget_s,
            seeds=seeds,
        )
        self.result.budget_s, self.result.seeds = budget_s, seeds
        self.earlier = self.result.spent_s
        for key in keys:
            self.result.mechanisms.setdefault(key, MechanismResult(key))
        # Where the field stands is written in the records alone, so that a resumed race needs nothing else.
        self.active = [
            key for key in keys if self.result.mechanisms[key].status in ("waiting", "running", "interrupted")
        ]
        out = ("refused", "failed")
        self.sizes = field_sizes(sum(self.result.mechanisms[key].status not in out for key in keys))
        self.runners: dict[tuple[str, int], _Runner] = {}

    # -- the course of the race ----------------------------------------------------------------------------

    def run(self) -> RaceResult:
        """Run all rungs; see `race`."""
        if self.result.complete:
            return self.result
        try:
            self._say("start", message=f"{len(self.active)} mechanisms start")
            while not self._rung(len(self.result.rungs)):
                pass
            for key in list(self.active):
                self._end(key, "finished", "")
            self.result.complete = True
        except (_Stopped, KeyboardInterrupt):
            for key in self.active:
                self.result.mechanisms[key].status = "interrupted"
            self._tidy()
            self._say("stopped", message="stopped; everything measured until now is kept")
        self._tidy()
        self._say("end")
        return self.result

    def _rung(self, rung: int) -> bool:
        """Run one rung; return whether it was the last."""
        if rung >= len(self.sizes):
            return True  # stopped after the last rung, while the result was being told
        for key in list(self.active):
            self._enter(key, 0)
        if rung:
            self._cut(self.sizes[rung])
        else:
            self._calibrate()
        # Those who failed meanwhile leave room: what is ahead is planned with the field there is.
        ahead = [size for size in self.sizes[rung + 1 :] if size < len(self.active)]
        plan = [*self.sizes[:rung], len(self.active), *ahead]
        deadline = self._elapsed() + max(0.0, self._left()) * shares(plan, self.result.seeds)[rung]
        if not ahead:
            self._add_seeds()
        if not self.active:
            return True
        said = f"rung {rung + 1} of {len(plan)}: {len(self.active)} mechanisms"
        self._say("rung", message=said + ("" if ahead else f", {self.result.seeds} seeds each"))
        self._level()
        for round_ in range(ROUNDS, 0, -1):
            steps = self._affordable(deadline, round_)
            if steps < 1 and any(self.result.mechanisms[r.key].at(r.trainer.step) for r in self._field()):
                break
            self._round(max(steps, 1))
        self.result.rungs.append(max((r.trainer.step for r in self._field()), default=0))
        self._tidy()
        return not ahead

    def _enter(self, key: str, seed: int) -> None:
        """Build a runner, or refuse its mechanism with the reason it gives."""
        if (key, seed) in self.runners:
            return
        record = self.result.mechanisms[key]

        def make(spec: NetSpec, seed: int) -> Backbone:
            return self.build(key, spec, seed=seed)

        try:
            trainer = Trainer(self.workload, make, seed=seed, device=self.device, dtype=self.dtype)
        except (ArgumentError, UnsupportedError, UnknownNameError) as error:
            return self._end(key, "refused", str(error))
        except Exception as error:
            return self._end(key, "failed", f"{type(error).__name__}: {error}")
        counts = trainer.model.parameter_counts()
        record.status, record.params, record.mixer_params = "running", counts["total"], counts["mixers"]
        path = self._path(key, seed)
        if path is not None and path.exists():
            trainer.load_state_dict(torch.load(path, weights_only=True))
        self.runners[key, seed] = _Runner(key, seed, trainer)
        if trainer.step:
            self.runners[key, seed].step_seconds = trainer.seconds / trainer.step

    def _cut(self, keep: int) -> None:
        """Send home all but the best `keep` of the field, judged at their common step."""
        scores = [
            Scored(key, record.quality, record.quality_se, record.steps)
            for key in self.active
            if (record := self.result.mechanisms[key]).measured
        ]
        stay = survivors(scores, keep, higher_is_better=self.workload.higher_is_better)
        for key in [key for key in self.active if key not in stay]:
            steps = self.result.mechanisms[key].steps
            self._end(key, "eliminated", f"not among the best {len(stay)} after {steps} steps")

    def _add_seeds(self) -> None:
        """Give finalists their further seeds, and fewer finalists where the time left cannot carry all."""
        extra = self.result.seeds - 1
        while self.result.rungs and len(self.active) > 2 and extra * self._cost_so_far() > 0.9 * self._left():
            self._cut(len(self.active) - 1)
        for seed in range(1, self.result.seeds):
            for key in list(self.active):
                self._enter(key, seed)

    def _cost_so_far(self) -> float:
        return sum(self.runners[key, 0].trainer.seconds for key in self.active if (key, 0) in self.runners)

    # -- training ------------------------------------------------------------------------------------------

    def _field(self) -> list[_Runner]:
        return [runner for runner in self.runners.values() if runner.key in self.active]

    def _level(self) -> None:
        """Bring everybody to the step of the most advanced: further seeds, and runs that were cut short."""
        runners = self._field()
        seen = [p.step for key in self.active for p in self.result.mechanisms[key].curve]
        ahead = max([r.trainer.step for r in runners] + seen, default=0)
        for runner in runners:
            if runner.key not in self.active:
                continue
            if runner.trainer.step < ahead:
                self._train(runner, ahead - runner.trainer.step)
            # The few steps of the calibration are not worth a score.
            if ahead > 1 + CALIBRATION and runner.key in self.active:
                self._score(runner)

    def _calibrate(self) -> None:
        """Measure step times on real steps, and leave out who would take the others' time."""
        for runner in self._field():
            if runner.trainer.step == 0:
                # The first step pays for caches and code that the others find ready.
                self._train(runner, 1)
                if runner.key in self.active:
                    self._train(runner, CALIBRATION)
        budget = LARGEST_SHARE * shares(self.sizes, self.result.seeds)[0] * self._left()
        usual = median([r.step_seconds for r in self._field()] or [0.0])
        for runner in self._field():
            # Twenty steps are about the least that can tell anything.
            if len(self.active) > 1 and 20 * runner.step_seconds > budget and runner.step_seconds > 5 * usual:
                self._end(
                    runner.key,
                    "refused",
                    f"too slow to race in this budget: a step takes {runner.step_seconds:.2g} s, "
                    f"the median mechanism's {usual:.2g} s",
                )

        self._fit_field()

    def _fit_field(self) -> None:
        """Leave out whom the first rung cannot carry."""
        left = shares(self.sizes, self.result.seeds)[0] * self._left()
        steps = MIN_STEPS + ROUNDS * self._scoring_steps()
        kept = fitting({r.key: r.step_seconds * steps for r in self._field()}, left, _family)
        said = (
            f"left out: this budget gives {MIN_STEPS} steps to the fastest of each family, family by family"
        )
        for key in [key for key in self.active if key not in kept]:
            self._end(key, "refused", f"{said}; a larger budget or fewer mechanisms race it")
        self.sizes = field_sizes(len(self.active))

    def _scoring_steps(self) -> float:
        """How many steps one evaluation takes as long as: measured on the first of the field."""
        field = self._field()
        if not field or not field[0].step_seconds > 0:
            return 0.0
        begin = time.perf_counter()
        try:
            field[0].trainer.evaluate()
        except Exception:
            return 0.0  # it will say why when it is scored
        return (time.perf_counter() - begin) / field[0].step_seconds

    def _affordable(self, deadline: float, rounds: int) -> int:
        """Steps of the next of `rounds` equal rounds until `deadline`."""
        field = self._field()
        step = sum(r.step_seconds for r in field if not math.isnan(r.step_seconds))
        scoring = sum(r.eval_seconds for r in field)
        left = min(deadline - self._elapsed(), self._left())
        return int((left / rounds - scoring) / step) if step > 0 else 0

    def _round(self, steps: int) -> None:
        """Let everybody do `steps` steps and score them."""
        for runner in self._field():
            if runner.key in self.active:
                loss = self._train(runner, steps)
            if runner.key in self.active:
                self._score(runner, loss)
        self._tidy()

    def _train(self, runner: _Runner, steps: int) -> float:
        """Train one runner in short stretches, so that stopping is prompt; a failure ends its mechanism."""
        before, first, losses = runner.trainer.seconds, runner.trainer.step, 0.0
        while (done := runner.trainer.step - first) < steps:
            if self.stop():
                raise _Stopped
            stretch = min(10, steps - done)
            try:
                losses += stretch * runner.trainer.advance(stretch)
            except Exception as error:
                self._end(runner.key, "failed", f"{type(error).__name__}: {error}")
                return math.nan
            self._say("progress", runner.key, f"{runner.key}, seed {runner.seed}: step {runner.trainer.step}")
        runner.step_seconds = (runner.trainer.seconds - before) / max(steps, 1)
        self.result.mechanisms[runner.key].step_seconds = runner.step_seconds
        return losses / max(steps, 1)

    def _score(self, runner: _Runner, loss: float = math.nan) -> None:
        """Evaluate one runner and write the point into its mechanism's record."""
        record = self.result.mechanisms[runner.key]
        step = runner.trainer.step
        if any(p.seed == runner.seed for p in record.at(step)):
            return
        begin = time.perf_counter()
        try:
            found = runner.trainer.evaluate()
        except Exception as error:
            return self._end(runner.key, "failed", f"{type(error).__name__}: {error}")
        runner.eval_seconds = time.perf_counter() - begin
        if not math.isfinite(found.quality):
            return self._end(runner.key, "failed", f"its quality is {found.quality} after {step} steps")
        record.curve.append(
            CurvePoint(
                runner.seed, step, runner.trainer.seconds, found.quality, found.quality_se, found.parts, loss
            )
        )
        path = self._path(runner.key, runner.seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            torch.save(runner.trainer.state_dict(), fresh)
            os.replace(fresh, path)
        self._tidy()
        said = f"{runner.key}: {self.workload.metric} {found.quality:.3f} after {step} steps"
        self._say("progress", runner.key, said, record)

    # -- records -------------------------------------------------------------------------------------------

    def _end(
        self, key: str, status: Literal["refused", "failed", "eliminated", "finished"], reason: str
    ) -> None:
        """Close a mechanism's record and let its networks go."""
        record = self.result.mechanisms[key]
        record.status, record.reason = status, reason
        if key in self.active:
            self.active.remove(key)
        for runner in [r for r in self.runners if r[0] == key]:
            del self.runners[runner]
        self._tidy()
        self._say(status, key, reason, record)

    def _tidy(self) -> None:
        """Bring the time spent and the summaries of all records up to date."""
        self.result.spent_s = self._elapsed()
        summarise(self.result, self.active)

    def _path(self, key: str, seed: int) -> Path | None:
        return None if self.checkpoints is None else self.checkpoints / f"{key}-{seed}.pt"

    def _elapsed(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def _left(self) -> float:
        return self.result.budget_s - self._elapsed()

    def _say(
        self, kind: EventKind, key: str = "", message: str = "", record: MechanismResult | None = None
    ) -> None:
        fraction = min(1.0, self._elapsed() / self.result.budget_s)
        self.listen(RaceEvent(kind, key, fraction, message, record, self.result))
