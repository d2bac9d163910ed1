"""Who may take part in a workload: everyone that can be built for it, sees no future, and computes right.

A mechanism that can't do the workload is refused with its own reason; one whose correctness gate is red has
failed, and no figure of it is ever shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import Facts
from foveate.measure.exactness import error_against_full
from foveate.measure.gate import Gate, causality_probe, check_mechanism
from foveate.measure.reach import reach_levels
from foveate.measure.store import empty_row
from foveate.measure.subject import Subject
from foveate.measure.threads import threads

# Sides of the small grids on which the gate, the picture and the exactness are found, by number of axes.
_GATE_SIDE = {1: 128, 2: 16, 3: 8}
_PICTURE_SIDE = {1: 64, 2: 24, 3: 8}
_EXACT_SIDE = {1: 512, 2: 24, 3: 8}
# Channels of a head in these examinations: what they find does not depend on more.
_HEAD_DIM = 16


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a workload asks of a mechanism."""

    dim: int
    heads: int
    grid: Grid
    causal: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def build(self, facts: Facts, grid: Grid | None = None) -> Subject:
        """Build a mechanism here, on this site's device and dtype, or for another grid."""
        where = self.grid if grid is None else grid
        subject = Subject.build(facts, dim=self.dim, grid=where, heads=self.heads, causal=self.causal)
        subject.module.to(self.device, self.dtype)
        return subject

    def small(self, facts: Facts, side: dict[int, int]) -> Site:
        """The same with at most `side` tokens per axis and narrow heads, as far as the mechanism takes it."""
        grid = Grid(*(min(size, side[self.grid.ndim]) for size in self.grid))
        narrow = min(self.dim, self.heads * _HEAD_DIM)
        for site in (replace(self, grid=grid, dim=narrow), replace(self, grid=grid)):
            try:
                site.build(facts)
            except (ArgumentError, UnsupportedError):
                continue
            return site
        return self


@dataclass
class Admission:
    """Outcome for one mechanism: `row` is set (refused or failed), or it takes part with `facts_row`."""

    facts: Facts
    row: dict[str, Any] | None = None
    facts_row: dict[str, Any] = field(default_factory=dict)


def one_line(error: BaseException) -> str:
    """An error as one sentence for a table; ours speak for themselves, others are named."""
    said = " ".join(str(error).split()) or "no message"
    return said if isinstance(error, ArgumentError | UnsupportedError) else f"{type(error).__name__}: {said}"


def describe(facts: Facts) -> dict[str, Any]:
    """The registry's words that every row carries."""
    return {
        "family": facts.family,
        "fidelity": facts.fidelity,
        "paper": facts.paper,
        "cost": facts.cost,
    }


class Examiner:
    """Runs the gate and finds picture and exactness, each once per mechanism and small site.

    Args:
        baseline: full attention, for the exactness figure; None leaves it out.
        seed: of parameters and inputs.
    """

    def __init__(self, baseline: Facts | None = None, seed: int = 0):
        self.baseline, self.seed = baseline, seed
        self._known: dict[tuple[Any, ...], Any] = {}

    def _once(self, name: str, facts: Facts, site: Site, find: Callable[[Facts, Site], Any]) -> Any:
        key = (name, facts.key, site)
        if key not in self._known:
            torch.manual_seed(self.seed)
            self._known[key] = find(facts, site)
        return self._known[key]

    def gate(self, facts: Facts, site: Site) -> Gate:
        """The correctness gate at a small size."""
        return self._once("gate", facts, site.small(facts, _GATE_SIDE), self._gate)

    def reach(self, facts: Facts, site: Site) -> dict[str, Any]:
        """The picture's grid and levels."""
        with threads(1):  # on such small tensors a second thread costs more than it does
            return self._once("reach", facts, site.small(facts, _PICTURE_SIDE), self._reach)

    def exactness(self, facts: Facts, site: Site) -> float | None:
        """Distance to full attention, None where it means nothing."""
        with threads(1):
            return self._once("exactness", facts, site.small(facts, _EXACT_SIDE), self._exactness)

    def _gate(self, facts: Facts, site: Site) -> Gate:
        return check_mechanism(
            lambda: site.build(facts),
            batch_coupled=facts.batch_coupled,
            causal=site.causal,
            dtype=site.dtype,
            seed=self.seed,
        )

    def _reach(self, facts: Facts, site: Site) -> dict[str, Any]:
        subject = site.build(facts)
        subject.module.float()
        return {"grid": list(site.grid.sizes), "levels": reach_levels(subject, seed=self.seed)}

    def _exactness(self, facts: Facts, site: Site) -> float | None:
        if self.baseline is None:
            return None
        pair = [site.build(f) for f in (facts, self.baseline)]
        for subject in pair:
            subject.module.float()
        return error_against_full(pair[0], pair[1], seed=self.seed)


def admit(workload: str, facts: Facts, site: Site, *, examiner: Examiner) -> Admission:
    """Decide whether one mechanism takes part.

    Args:
        workload: key, for the row.
        facts: the mechanism.
        site: what the workload asks for.
        examiner: runs the examinations, and remembers them from other workloads.

    Returns:
        An `Admission`; it never raises for a mechanism's fault.
    """
    said = describe(facts)

    def out(status: str, reason: str, **more: Any) -> Admission:
        return Admission(facts, empty_row(workload, facts.key, status, reason, **said, **more))

    if not hasattr(facts.cls, "for_workload"):
        said_why = f". {facts.limits}" if facts.layout == "cross" and facts.limits else ""
        return out(
            "refused",
            f"it is a {facts.role} without `for_workload`, not a layer that can be compared{said_why}",
        )
    try:
        subject = site.build(facts)
    except (ArgumentError, UnsupportedError) as error:
        lead = "not causal: " if site.causal and facts.causal == "no" else ""
        return out("refused", lead + one_line(error))
    except Exception as error:
        return out("failed", f"building it raised {one_line(error)}")
    try:
        if site.causal:
            check = causality_probe(subject, seed=examiner.seed)
            if not check.ok:
                return out("refused", f"not causal: {check.sentence}")
        del subject
        gate = examiner.gate(facts, site)
        if not gate.ok:
            return out("failed", f"correctness gate is red: {gate.reason}", gate=gate.as_dict())
        found = {
            "gate": gate.as_dict(),
            "reach": examiner.reach(facts, site),
            "exactness_error": examiner.exactness(facts, site),
        }
    except Exception as error:
        return out("failed", one_line(error))
    return Admission(facts, facts_row={**said, **found})
