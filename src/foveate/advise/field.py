"""Who races in which rung, and what part of the time a rung gets: pure functions on names and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

# Where the rungs of a race should end, in steps relative to the first rung's end. The first rung gets most:
# what is far apart in an image is learned later than what is near, and who learns it must not be cut before.
GROWTH = {1: (1.0,), 2: (1.0, 1.4), 3: (1.0, 1.25, 1.5)}
FINALISTS = 3
# Fewer steps tell nothing: a budget that cannot give them to all races as many as it can give them to.
MIN_STEPS = 40


def field_sizes(n: int, finalists: int = FINALISTS) -> list[int]:
    """Return how many mechanisms stand in each rung: all, half, finalists; rungs that cut nobody are omitted.

    Examples:
        >>> field_sizes(12), field_sizes(5), field_sizes(3)
        ([12, 6, 3], [5, 3], [3])
    """
    sizes = [n]
    if n > 2 * finalists:
        sizes.append(math.ceil(n / 2))
    if n > finalists:
        sizes.append(finalists)
    return sizes


def shares(sizes: Sequence[int], seeds: int) -> list[float]:
    """Return each rung's share of the time that is left when it starts, so that steps grow as `GROWTH` says.

    The finalists' further seeds start from nothing and must catch up in the last rung.
    """
    ends = (0.0, *GROWTH[len(sizes)])
    costs = [n * (end - before) for n, before, end in zip(sizes, ends, ends[1:], strict=False)]
    costs[-1] += (seeds - 1) * sizes[-1] * ends[-1]
    return [cost / sum(costs[i:]) for i, cost in enumerate(costs)]


def fitting(
    seconds: Mapping[str, float], left: float, family: Callable[[str], str], finalists: int = FINALISTS
) -> list[str]:
    """Return whom `left` seconds carry for `MIN_STEPS` steps: the baseline, then the fastest of each family.

    Families take turns, so that every kind is there. The first few stay whatever they take.

    Args:
        seconds: mechanism -> seconds of `MIN_STEPS` steps and their evaluations.
        left: seconds for all of them.
        family: mechanism -> its family; "baseline" goes first.
        finalists: how many stay in any case.

    Examples:
        >>> fitting({"a1": 1.0, "a2": 2.0, "b1": 4.0, "b2": 9.0}, 7.5, lambda key: key[0], finalists=1)
        ['a1', 'b1', 'a2']
    """
    families: dict[str, list[str]] = {}
    for key in sorted(seconds, key=lambda key: seconds[key]):
        families.setdefault(family(key), []).append(key)
    order = [key for turn in zip_longest(*families.values()) for key in turn if key is not None]
    order.sort(key=lambda key: family(key) != "baseline")  # stable: the others keep their turns
    kept: list[str] = []
    for key in order:
        if len(kept) < finalists or seconds[key] <= left:
            kept.append(key)
            left -= seconds[key]
    return kept
