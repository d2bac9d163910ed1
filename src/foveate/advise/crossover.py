"""From which length a layer that scans pays: predicted from its FLOPs, and measured on the ladder of sizes.

The prediction counts operations and knows nothing of how well a machine runs them; beside it stands the length at
which forward plus backward really became faster than full attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from foveate.advise.admit import Site
from foveate.core.registry import Facts
from foveate.cost.linear import explain_linear, scans


def price(facts: Facts, site: Site) -> dict[str, Any]:
    """Return the fields of a `shapes` row that are known before anything runs: empty for what does not scan.

    Full attention is counted as it stands beside it in `shapes`: with all pairs unless the site is causal, also where
    the system itself sees earlier tokens only. Fields are None where its scans cannot be counted.

    Args:
        facts: the system, admitted to the site.
        site: width, heads, grid and dtype.
    """
    if not scans(facts.key):
        return {}
    where = {"dim": site.dim, "grid": site.grid, "heads": site.heads, "dtype": site.dtype}
    try:
        found = explain_linear(facts.key, **where, causal=site.causal or facts.causal == "always")
    except Exception:  # no operations to count, or none from shapes alone; its times are still to be had
        return dict.fromkeys(("flops_per_token", "state_bytes", "crossover_predicted"))
    return {
        "flops_per_token": found.flops_per_token,
        "state_bytes": found.state_bytes if found.causal else None,
        "crossover_predicted": found.crossover_against(causal=site.causal),
    }


def crossed(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the length from which all longer measured ones are faster than full attention.

    Between the two sizes around it the logarithm of the speed-up is taken as linear in that of the length.

    Args:
        points: of a `shapes` row, shortest first, with `tokens` and, where full attention was timed too, `speedup`.

    Returns:
        Tokens, or None when it is faster at every size or slower at the longest: nothing encloses the length.
    """
    known = [(p["tokens"], p["speedup"]) for p in points if p.get("speedup")]
    for (n, below), (m, above) in reversed(list(pairwise(known))):
        if above < 1.0:
            return None
        if below < 1.0:
            share = math.log(below) / math.log(below / above)
            return n * (m / n) ** share
    return None


def crossing_words(row: Mapping[str, Any]) -> str:
    """Say the measured crossover of a `shapes` row, or on which side of the measured sizes it lies."""
    if row.get("crossover_measured"):
        return f"{row['crossover_measured']:,.0f}"
    known = [p for p in row.get("points") or [] if p.get("speedup")]
    if not known:
        return "not timed beside it"
    first, last = known[0], known[-1]
    if last["speedup"] < 1.0:
        return f"not up to {last['tokens']:,}, the longest"
    return f"faster from {first['tokens']:,}, the shortest, on"
