"""How a measured cost grows with the number of tokens: the exponent of a power law, with its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.errors import bad


@dataclass(frozen=True)
class Exponent:
    """`cost ~ N ** value`, give or take `se`, fitted over `points` sizes."""

    value: float
    se: float | None
    points: int


def fit_exponent(
    tokens: Sequence[int], cost: Sequence[float], spread: Sequence[float] | None = None, *, last: int = 3
) -> Exponent | None:
    """Least-squares slope of log cost over log tokens.

    Only the `last` largest sizes count: at small ones the fixed cost of launching work hides the growth.
    The standard error is the larger of what the residuals say and what the spread of the single
    measurements says.

    Args:
        tokens: sizes N, in any order.
        cost: time or memory at each.
        spread: interquartile range of each cost, if known.
        last: how many of the largest sizes to use.

    Returns:
        The exponent, or None with fewer than two distinct sizes.

    Raises:
        ArgumentError: if the lists differ in length or hold a value that is not positive.
    """
    if len(tokens) != len(cost) or (spread is not None and len(spread) != len(cost)):
        raise bad("cost", len(cost), f"one value per size ({len(tokens)})")
    if any(not value > 0 for value in (*tokens, *cost)):
        raise bad("cost", list(cost), "positive values")
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])[-last:]
    x = [math.log(tokens[i]) for i in order]
    y = [math.log(cost[i]) for i in order]
    if len(set(x)) < 2:
        return None
    count = len(x)
    mean_x, mean_y = sum(x) / count, sum(y) / count
    sxx = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sxx
    errors = []
    if count > 2:
        rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
        errors.append(math.sqrt(rest / (count - 2) / sxx))
    if spread is not None:
        # The interquartile range of a normal variable is 1.349 standard deviations.
        sigma = [spread[i] / 1.349 / cost[i] for i in order]
        errors.append(math.sqrt(sum(((a - mean_x) * s) ** 2 for a, s in zip(x, sigma, strict=True))) / sxx)
    return Exponent(slope, max(errors) if errors else None, count)
