"""From rows to a choice, with the reasons: quality where it is resolved, else speed, memory and exactness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.advise.settings import BASELINE
from foveate.advise.svg import byte_words, grid_words, milliseconds, number
from foveate.core.errors import UnknownNameError
from foveate.core.registry import get_system

Row = Mapping[str, Any]
LEARNING = ("image", "restore", "text", "recall")


def _pm(row: Row) -> str:
    se = row.get("quality_se")
    return number(row["quality"]) + (f" ± {number(se, 2)}" if se else "")


def _listed(keys: list[str]) -> str:
    shown = [f"`{key}`" for key in keys]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _size(site: Mapping[str, Any]) -> str:
    return grid_words(site.get("measured_grid") or site.get("grid", ()))


def _unreached(site: Mapping[str, Any]) -> list[str]:
    """That the user's own size was not reached, if so."""
    if not site.get("measured_grid") or site["measured_grid"] == site.get("grid"):
        return []
    return [f"The time budget ended at {_size(site)}; {grid_words(site['grid'])} itself was not timed."]


def _times(ratio: float) -> str:
    return f"{number(ratio, 2)}x faster than" if ratio >= 1 else f"{number(1 / ratio, 2)}x slower than"


def code_to_paste(mechanism: str, site: Mapping[str, Any]) -> str:
    """Lines that build the mechanism at a workload's sizes and run it once.

    Args:
        mechanism: key in the registry.
        site: the workload's record, with grid, dim, heads and causal.
    """
    try:
        facts = get_system(mechanism)
    except UnknownNameError:
        return ""
    maker: Any = facts.cls
    sizes = ", ".join(map(str, site["grid"]))
    options = f"dim={site['dim']}, grid=grid, heads={site['heads']}"
    options += ", causal=True" if site.get("causal") else ""
    lines = [
        "import torch",
        "from foveate import Grid",
        f"from {maker.__module__} import {maker.__qualname__}",
        "",
        f"grid = Grid({sizes})",
        f"attention = {maker.__qualname__}.for_workload({options})",
        "",
    ]
    if facts.layout == "tokens":
        lines += [
            f"x = torch.randn(2, grid.numel, {site['dim']})  # (batch, tokens, channels), row-major",
            "y = attention(x, grid)  # the same shape",
        ]
    else:
        lines += [
            f"x = torch.randn(2, {site['dim']}, *grid)  # (batch, channels, *grid)",
            "y = attention(x)  # the same shape",
        ]
    return "\n".join(lines) + "\n"


def recommend(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one recommendation per workload with measured rows, the headline first.

    The headline is the first learning workload with resolved quality, else `shapes`, else what there is.
    Mechanisms whose equations are partly reconstructed are never recommended.

    Args:
        document: the parsed results.json.
    """
    by_workload: dict[str, list[Row]] = {}
    for row in document["rows"]:
        if row["status"] == "measured":
            by_workload.setdefault(row["workload"], []).append(row)
    found = []
    for workload, rows in by_workload.items():
        site = document["workloads"].get(workload, {})
        other = {r["mechanism"]: r for r in by_workload.get("shapes", []) if r.get("step_ms") is not None}
        sized = document["workloads"].get("shapes", {})
        if workload in LEARNING:
            one = _learned(workload, rows, site, other, sized)
        else:
            one = _timed(workload, rows, site)
        if one is not None:
            target = sized if workload in LEARNING and other else site
            if workload in LEARNING and (one["mechanism"] not in other or not target.get("grid")):
                target = site
            one["code"] = code_to_paste(one["mechanism"], target) if target.get("grid") else ""
            found.append(one)
    rank = {"quality": 0, "speed": 1}
    found.sort(key=lambda r: (rank[r["basis"]], r["workload"] != "shapes"))
    return found


def _eligible(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r.get("fidelity") != "reconstruction"]


def _cost(row: Row, other: Mapping[str, Row]) -> float:
    """Time that decides among equals: at the user's sizes when timed there, else the workload's own."""
    source = other.get(row["mechanism"], row)
    return source.get("step_ms") or row.get("step_ms") or float("inf")


def _speed_reason(key: str, rows: Mapping[str, Row], where: str) -> list[str]:
    """Sentences on speed, memory and scaling of one mechanism beside full attention."""
    row, dense = rows.get(key), rows.get(BASELINE)
    if row is None or row.get("step_ms") is None:
        return []
    if key == BASELINE or dense is None or dense.get("step_ms") is None:
        return [f"Forward and backward take {milliseconds(row['step_ms'])} {where}."]
    said = [
        f"{_times(dense['step_ms'] / row['step_ms']).capitalize()} full attention {where}: "
        f"{milliseconds(row['step_ms'])} against {milliseconds(dense['step_ms'])} forward and backward."
    ]
    if row.get("memory_bytes") and dense.get("memory_bytes"):
        said.append(
            f"Peak memory {byte_words(row['memory_bytes'])} against {byte_words(dense['memory_bytes'])}."
        )
    if row.get("exponent") is not None and dense.get("exponent") is not None:
        said.append(
            f"Its time grows like N^{row['exponent']:.2f}, full attention's like N^{dense['exponent']:.2f}."
        )
    if row.get("slower_than_dense"):
        said.append(f"Slower than full attention at {', '.join(row['slower_than_dense'])}.")
    return said


def _exact_reason(row: Row) -> list[str]:
    error = row.get("exactness_error")
    if row["mechanism"] == BASELINE or error is None:
        return []
    return [f"With equal weights its output is {100 * error:.0f} % away from full attention's (relative L2)."]


def _learned(
    workload: str,
    rows: list[Row],
    site: Mapping[str, Any],
    other: Mapping[str, Row],
    sized: Mapping[str, Any],
) -> dict[str, Any] | None:
    eligible = [r for r in _eligible(rows) if r.get("quality") is not None]
    resolved = [r for r in eligible if r.get("resolved")]
    if not eligible:
        return None
    where = f"at {grid_words(site.get('grid', ()))}"
    shared = other if all(r["mechanism"] in other for r in resolved or eligible) else {}
    if not resolved:
        pool = {r["mechanism"]: other.get(r["mechanism"], r) for r in eligible}
        one = _timed(workload, list(pool.values()), site)
        if one is not None:
            lead = f"Quality on `{workload}` is not resolved in this budget: no mechanism beats the best "
            lead += "trivial answer by more than the noise. The choice rests on speed, memory and exactness."
            one["caveats"] = [lead, *one["caveats"]]
        return one
    sign = 1.0 if site.get("higher_is_better", True) else -1.0
    # Only those trained to the end are ranked; before it, the most advanced stand in for them.
    top = max(resolved, key=lambda r: (r.get("rank") is not None, r.get("steps") or 0, sign * r["quality"]))
    tied = {top["mechanism"], *(top.get("tied_with") or [])}
    tier = [r for r in resolved if r["mechanism"] in tied]
    ranked = sorted(tier, key=lambda r: _cost(r, shared))
    rest = [r for r in resolved if r not in tier]
    rest.sort(key=lambda r: (r.get("rank") or len(rows), -sign * r["quality"]))
    best = ranked[0]
    name, metric = best["mechanism"], site.get("metric") or "quality"
    rivals = [r["mechanism"] for r in ranked[1:]]
    reasons = [f"{metric.capitalize()} on `{workload}`: {_pm(best)}; the best trivial answer reaches "
               f"{number(site['floor'])}." if site.get("floor") is not None
               else f"{metric.capitalize()} on `{workload}`: {_pm(best)}."]  # fmt: skip
    if rivals:
        reasons.append(f"The noise does not separate it from {_listed(rivals)}; it is the fastest of them.")
    elif rest:
        reasons.append("It beats every other mechanism by more than the noise.")
    if shared:
        reasons += _speed_reason(name, shared, f"at {_size(sized)}")
    else:
        reasons += _speed_reason(name, {r["mechanism"]: r for r in rows}, f"{where}, whole network")
    reasons += _exact_reason(other.get(name, best))
    caveats = _unreached(sized) if shared else []
    if (best.get("seeds") or 0) < 3:
        count = best.get("seeds") or 0
        caveats.append(f"Its quality is from {count} {'seed' if count == 1 else 'seeds'} only.")
    lost = [r["mechanism"] for r in eligible if not r.get("resolved")]
    if lost:
        caveats.append(f"Not resolved in this budget: {_listed(lost)}.")
    places = [
        {"mechanism": r["mechanism"], "why": _why_quality(r, best, shared, i)} for i, r in enumerate(ranked)
    ]
    places += [{"mechanism": r["mechanism"], "why": f"{_pm(r)}, {_behind(r, best, sign)}"} for r in rest]
    return {
        "workload": workload,
        "mechanism": name,
        "basis": "quality",
        "headline": _headline(name, f"the best choice for `{workload}` among what was measured"),
        "reasons": reasons,
        "caveats": caveats,
        "ranked": places,
    }


def _behind(row: Row, best: Row, sign: float) -> str:
    if (row.get("steps") or 0) < (best.get("steps") or 0):
        return f"left the race after {row.get('steps') or 0} steps"
    gap = sign * (best["quality"] - row["quality"])
    return "below the best by more than the noise" if gap > 0 else "not separated from the best, fewer seeds"


def _why_quality(row: Row, best: Row, other: Mapping[str, Row], place: int) -> str:
    cost = _cost(row, other)
    said = _pm(row)
    if cost < float("inf"):
        said += f", {milliseconds(cost)}"
    if place == 0:
        return said
    lead = _cost(best, other)
    if not cost < float("inf"):
        return said
    longer = f"{number(cost / lead, 2)}x the time" if cost > 1.05 * lead else "the same time"
    return f"{said}: as good within the noise, {longer}"


def _headline(name: str, praise: str) -> str:
    return f"Keep full attention: it is {praise}." if name == BASELINE else f"Use `{name}`: it is {praise}."


def _timed(workload: str, rows: list[Row], site: Mapping[str, Any]) -> dict[str, Any] | None:
    eligible = [r for r in _eligible(rows) if r.get("step_ms") is not None]
    if not eligible:
        return None
    by_key = {r["mechanism"]: r for r in eligible}
    ranked = sorted(eligible, key=lambda r: r["step_ms"])
    fastest = ranked[0]
    limit = (
        fastest["step_ms"]
        + (fastest.get("forward_spread_ms") or 0)
        + (fastest.get("backward_spread_ms") or 0)
    )
    level = [r for r in ranked if r["step_ms"] <= limit]
    best = min(level, key=lambda r: (r.get("memory_bytes") or float("inf"), r["step_ms"]))
    ranked = [best, *(r for r in ranked if r is not best)]
    name = best["mechanism"]
    where = f"at {_size(site)}"
    reasons = _speed_reason(name, by_key, where)
    if len(level) > 1:
        names = [r["mechanism"] for r in level if r is not best]
        reasons.append(f"{_listed(names)} cannot be told apart in time; it needs the least memory of them.")
    reasons += _exact_reason(best)
    dense = by_key.get(BASELINE)
    quicker = [r for r in ranked if dense is not None and r["step_ms"] < dense["step_ms"]]
    near = [r for r in quicker if r.get("exactness_error") is not None]
    if near:
        close = min(near, key=lambda r: r["exactness_error"])
        if close is not best:
            reasons.append(
                f"Of those faster than full attention, `{close['mechanism']}` stays closest to its output "
                f"({100 * close['exactness_error']:.0f} % away)."
            )
    caveats = _unreached(site)
    if workload == "shapes":
        caveats.append(
            "Speed alone does not say what a mechanism can learn; image, restore, text and recall do."
        )
    elif dense is not None and not quicker:
        caveats.append(f"Nothing measured is faster than full attention {where}.")
    places = []
    for row in ranked:
        why = milliseconds(row["step_ms"])
        if row["mechanism"] != BASELINE and dense is not None:
            why += f", {_times(dense['step_ms'] / row['step_ms'])} full attention"
        places.append({"mechanism": row["mechanism"], "why": why})
    return {
        "workload": workload,
        "mechanism": name,
        "basis": "speed",
        "headline": _headline(name, f"the fastest forward and backward {where}"),
        "reasons": reasons,
        "caveats": caveats,
        "ranked": places,
    }
