"""Who may take part in a workload: everyone that can be built for it, sees no future, and computes right.

A mechanism that can't do the workload is refused with its own reason; one whose correctness gate is red has
failed, and no figure of it is ever shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

# Sides of the small grids on which the gate, the picture and the exactness are found, by number of axes.
_GATE_SIDE = {1: 128, 2: 16, 3: 8}
_PICTURE_SIDE = {1: 64, 2: 24, 3: 8}
_EXACT_SIDE = {1: 1024, 2: 32, 3: 8}


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
        subject = Subject.build(
            facts,
            dim=self.dim,
            grid=self.grid if grid is None else grid,
            heads=self.heads,
            causal=self.causal,
        )
        subject.module.to(self.device, self.dtype)
        return subject

    def small(self, facts: Facts, side: dict[int, int]) -> Grid:
        """A grid of at most `side` per axis if the mechanism takes it, or else the site's own."""
        grid = Grid(*(min(size, side[self.grid.ndim]) for size in self.grid))
        try:
            self.build(facts, grid)
        except (ArgumentError, UnsupportedError):
            return self.grid
        return grid


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


def admit(workload: str, facts: Facts, site: Site, *, baseline: Facts | None, seed: int = 0) -> Admission:
    """Decide whether one mechanism takes part.

    Args:
        workload: key, for the row.
        facts: the mechanism.
        site: what the workload asks for.
        baseline: full attention, for the exactness figure; None leaves it out.
        seed: of parameters and inputs.

    Returns:
        An `Admission`; it never raises for a mechanism's fault.
    """
    said = describe(facts)

    def out(status: str, reason: str, **more: Any) -> Admission:
        return Admission(facts, empty_row(workload, facts.key, status, reason, **said, **more))

    if not hasattr(facts.cls, "for_workload"):
        return out(
            "refused", f"it is a {facts.role} without `for_workload`, not a layer that can be compared"
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
            check = causality_probe(subject, seed=seed)
            if not check.ok:
                return out("refused", f"not causal: {check.sentence}")
        del subject
        gate = _gate(facts, site, seed)
        if not gate.ok:
            return out("failed", f"correctness gate is red: {gate.reason}", gate=gate.as_dict())
        extra: dict[str, Any] = {"gate": gate.as_dict(), "reach": _picture(facts, site, seed)}
        extra["exactness_error"] = _exactness(facts, site, baseline, seed)
    except Exception as error:
        return out("failed", one_line(error))
    return Admission(facts, facts_row={**said, **extra})


def _gate(facts: Facts, site: Site, seed: int) -> Gate:
    grid = site.small(facts, _GATE_SIDE)
    return check_mechanism(
        lambda: site.build(facts, grid),
        batch_coupled=facts.batch_coupled,
        causal=site.causal,
        dtype=site.dtype,
        seed=seed,
    )


def _picture(facts: Facts, site: Site, seed: int) -> dict[str, Any]:
    grid = site.small(facts, _PICTURE_SIDE)
    torch.manual_seed(seed)
    subject = site.build(facts, grid)
    subject.module.float()
    return {"grid": list(grid.sizes), "levels": reach_levels(subject, seed=seed)}


def _exactness(facts: Facts, site: Site, baseline: Facts | None, seed: int) -> float | None:
    if baseline is None:
        return None
    grid = site.small(facts, _EXACT_SIDE)
    torch.manual_seed(seed)
    pair = [site.build(f, grid) for f in (facts, baseline)]
    for subject in pair:
        subject.module.float()
    return error_against_full(pair[0], pair[1], seed=seed)
