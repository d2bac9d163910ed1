"""Which differences are real. Pure functions on numbers: noise, ranks, survivors, Pareto front.

The rule, everywhere: a difference counts when it exceeds twice the combined standard error of its two
sides (about 95 % for a single comparison). The error of a quality has two sources that add in squares:
the test examples, which more seeds do not average away because all seeds answer the same examples, and the
seeds, whose spread is pooled over all mechanisms that have several, and lent to those that have one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SIGMAS = 2.0
NOT_RESOLVED = "not resolved in this budget"


@dataclass(frozen=True)
class Scored:
    """One mechanism's quality after `steps` steps."""

    key: str
    quality: float
    quality_se: float
    steps: int


@dataclass(frozen=True)
class Standing:
    """What may be said about one mechanism.

    Attributes:
        resolved: it beats the trivial answers by more than the noise.
        rank: 1 + how many are really better, among those with as many steps; None when not resolved, or
            when it was trained for fewer steps than the leaders and therefore has no rank among them.
        tied_with: those with as many steps whose difference from it is within the noise.
        separated: whether it differs from every other with as many steps by more than the noise.
    """

    resolved: bool
    rank: int | None = None
    tied_with: list[str] = field(default_factory=list)
    separated: bool = False

    @property
    def word(self) -> str:
        """The cell's text: the rank, or why there is none."""
        if not self.resolved:
            return NOT_RESOLVED
        if self.rank is None:
            return "left the race early"
        return f"{self.rank} (tied)" if self.tied_with else f"{self.rank}"


def combined(*errors: float) -> float:
    """Square root of the sum of squares; unknown errors (NaN) count as zero."""
    return math.hypot(*(0.0 if math.isnan(e) else e for e in errors))


def beats(
    a: float,
    a_se: float,
    b: float,
    b_se: float = 0.0,
    *,
    higher_is_better: bool = True,
    sigmas: float = SIGMAS,
) -> bool:
    """Whether `a` is better than `b` by more than `sigmas` combined errors; never when one is NaN."""
    lead = a - b if higher_is_better else b - a
    return lead > sigmas * combined(a_se, b_se)


def pooled_sd(groups: Iterable[Sequence[float]]) -> float:
    """Spread within groups, pooled over those with two values or more; NaN when there are none."""
    squares, freedom = 0.0, 0
    for values in groups:
        if len(values) >= 2:
            mean = sum(values) / len(values)
            squares += sum((v - mean) ** 2 for v in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def quality_error(example_errors: Sequence[float], seed_sd: float) -> float:
    """Standard error of a mean over seeds.

    Args:
        example_errors: each seed's standard error over the test examples, which all seeds share.
        seed_sd: spread between seeds (NaN when unknown: the result then lacks that part).
    """
    examples = sum(example_errors) / len(example_errors)
    return combined(examples, seed_sd / math.sqrt(len(example_errors)))


def survivors(scores: Sequence[Scored], keep: int, *, higher_is_better: bool = True) -> list[str]:
    """Return the keys of the best `keep`, in their given order; ties go to the earlier one."""
    sign = -1.0 if higher_is_better else 1.0
    best = sorted(range(len(scores)), key=lambda i: (sign * scores[i].quality, i))[:keep]
    return [scores[i].key for i in sorted(best)]


def standings(
    scores: Sequence[Scored], floor: float, *, higher_is_better: bool = True, sigmas: float = SIGMAS
) -> dict[str, Standing]:
    """Say of every mechanism what the noise allows to be said; only equal step counts are compared."""

    def better(a: Scored, b: Scored) -> bool:
        return beats(
            a.quality, a.quality_se, b.quality, b.quality_se, higher_is_better=higher_is_better, sigmas=sigmas
        )

    most = max((s.steps for s in scores), default=0)
    out = {}
    for one in scores:
        peers = [s for s in scores if s.key != one.key and s.steps == one.steps]
        tied = sorted(s.key for s in peers if not better(s, one) and not better(one, s))
        resolved = beats(one.quality, one.quality_se, floor, higher_is_better=higher_is_better, sigmas=sigmas)
        rank = 1 + sum(better(s, one) for s in peers) if resolved and one.steps == most else None
        out[one.key] = Standing(resolved, rank, tied, not tied)
    return out


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool = True) -> list[int]:
    """Return the indices of points (cost, quality) that none equals or betters in both and beats in one.

    Points with a NaN are never on the front.
    """
    sign = 1.0 if higher_is_better else -1.0
    known = [(i, c, sign * q) for i, (c, q) in enumerate(points) if not (math.isnan(c) or math.isnan(q))]
    return [
        i for i, c, q in known if not any(c2 <= c and q2 >= q and (c2 < c or q2 > q) for _, c2, q2 in known)
    ]


def quality_at(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """Quality after `seconds` of training, by straight lines between points (seconds, quality).

    NaN outside the curve: nothing is extrapolated.
    """
    curve = sorted(curve)
    for (t0, q0), (t1, q1) in pairwise(curve):
        if t0 <= seconds <= t1:
            return q0 if t1 == t0 else q0 + (q1 - q0) * (seconds - t0) / (t1 - t0)
    return curve[0][1] if len(curve) == 1 and curve[0][0] == seconds else math.nan
