"""Successive halving over mechanisms: everybody starts, the better half goes on, finalists get more seeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from foveate.advise.records import MechanismResult, RaceResult
from foveate.models.backbone import Backbone
from foveate.tasks.workload import Workload


@dataclass(frozen=True)
class RaceEvent:
    """Something a progress display may want to know.

    Attributes:
        kind: "start" | "refused" | "failed" | "rung" | "progress" | "eliminated" | "finished" | "stopped" | "end".
        key: the mechanism, or "".
        fraction: share of the race's time that is spent, 0 to 1.
        message: one sentence for people.
        result: the mechanism's record, or None.
    """

    kind: Literal[
        "start", "refused", "failed", "rung", "progress", "eliminated", "finished", "stopped", "end"
    ]
    key: str = ""
    fraction: float = 0.0
    message: str = ""
    result: MechanismResult | None = None


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
    """Race mechanisms on a workload for `budget_s` seconds (being written)."""
    raise NotImplementedError
