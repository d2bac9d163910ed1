"""report.html: one self-contained page that works offline, made from results.json and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from foveate.advise import plots
from foveate.advise.crossover import crossing_words
from foveate.advise.reach import reach_picture
from foveate.advise.recommend import LEARNING
from foveate.advise.settings import BASELINE
from foveate.advise.svg import byte_words, grid_words, milliseconds, number, words
from foveate.advise.table import order, quality_words
from foveate.core.errors import need_extra
from foveate.measure.store import write_atomically

Row = Mapping[str, Any]

# Columns of the sortable table: heading, field, how a value is written, whether larger is shown first.
_COLUMNS = (
    ("quality", "quality", None),
    ("forward", "forward_ms", milliseconds),
    ("backward", "backward_ms", milliseconds),
    ("vs full", "speedup", lambda v: f"{v:.2f}×"),
    ("bound", "speedup_bound", lambda v: f"{v:.2f}×"),
    ("core vs tiles", "core_gain", lambda v: f"{v:.2f}×"),
    ("memory", "memory_bytes", byte_words),
    ("state", "state_bytes", byte_words),
    ("growth", "exponent", lambda v: f"N<sup>{v:.2f}</sup>"),
    ("params", "params", lambda v: f"{v:,}"),
    ("GFLOPs", "flops", lambda v: number(v / 1e9)),
    ("off full", "exactness_error", lambda v: f"{100 * v:.0f} %"),
    ("equal time", "quality_at_equal_time", number),
    ("steps", "steps", None),
)
# In a network these say more about the rest of it; `shapes` has them.
_HIDDEN_WITH_QUALITY = ("speedup_bound", "exactness_error", "flops")
# Of `shapes` it stands beside the crossover.
_HIDDEN_WITHOUT = ("state_bytes",)


def _cell(row: Row, field: str, word) -> dict[str, Any]:
    value = row.get(field)
    if field == "quality":
        return {"sort": value, "html": escape(quality_words(row)), "dim": row.get("resolved") is False}
    if field == "steps":
        return {"sort": value, "html": "" if value is None else f"{value} × {row.get('seeds') or 0}"}
    if row["mechanism"] == BASELINE and field in ("speedup", "speedup_bound", "exactness_error"):
        return {"sort": value, "html": "–"}
    html = "" if value is None else word(value)
    spread = row.get(field.replace("_ms", "_spread_ms")) if field.endswith("_ms") else None
    if spread:
        html += f' <span class="pm">±{number(spread / 2, 2)}</span>'
    return {"sort": value, "html": html}


def _table(rows: list[Row], best: str | None) -> dict[str, Any]:
    """Columns that hold something, and the cells of every row."""
    learns = any(r.get("quality") is not None for r in rows)
    hidden = _HIDDEN_WITH_QUALITY if learns else _HIDDEN_WITHOUT
    columns = [c for c in _COLUMNS if c[1] not in hidden and any(r.get(c[1]) is not None for r in rows)]
    ordered = sorted(rows, key=lambda r: (r["mechanism"] != best, *order(r)))
    body = [
        {
            "key": row["mechanism"],
            "family": row.get("family") or "",
            "cls": plots.family_class(row),
            "best": row["mechanism"] == best,
            "picture": reach_picture(row.get("reach"), label=f"reach of {words(row['mechanism'])}", px=36),
            "cells": [_cell(row, field, word) for _, field, word in columns],
        }
        for row in ordered
    ]
    return {"columns": [c[0] for c in columns], "rows": body}


def _figures(
    rows: list[Row], info: Mapping[str, Any], best: str | None, *, learns: bool, sized: bool
) -> list[dict[str, str]]:
    """Pictures of one workload, each with a heading and a caption."""
    found = []

    def add(title: str, caption: str, svg: str, *, wide: bool = False) -> None:
        found.append(
            {"title": title, "caption": caption, "svg": svg, "wide": "wide" if wide else "", "other": ""}
        )

    pictured = any(r.get("curve") for r in rows)
    if learns and any(r.get("quality") is not None and r.get("step_ms") for r in rows):
        add(
            "Quality against time",
            "Up and to the left is better when higher quality is. The line joins mechanisms that nothing "
            "beats in both. Whiskers are two standard errors; hollow marks are not resolved in this budget.",
            plots.pareto(rows, info=info, best=best),
            wide=True,
        )
    kept = [r for r in rows if r.get("state_bytes") and r.get("quality") is not None]
    if learns and kept:
        without = ", ".join(words(r["mechanism"]) for r in rows if not r.get("state_bytes"))
        add(
            "Quality against what decoding keeps",
            "Bytes of all layers after the whole length, for one sample: keys and values grow with the length, the "
            "state of a scan stays as it is, and a small one can hold only so much. Up and to the left is better; "
            "the line joins mechanisms that nothing beats in both; hollow marks are not resolved in this budget."
            + (f" Without decoding of their own: {without}." if without else ""),
            plots.pareto(kept, info=info, best=best, against="state"),
            wide=True,
        )
    if learns and pictured:
        add(
            "Quality as training goes on",
            "Read upwards at one moment for quality at equal time. Point at the end of a line for its name.",
            plots.curves(rows, info=info, best=best),
        )
    timed = [r for r in rows if r.get("points")]
    if timed:
        add(
            "Time as the grid grows",
            "Forward and backward. Both axes logarithmic: the slope is the exponent, fitted over the largest "
            "three sizes and written beside each name.",
            plots.scaling(timed, measure="time", best=best),
            wide=True,
        )
        if any(p.get("memory_bytes") for r in timed for p in r["points"]):
            found[-1]["other"] = plots.scaling(timed, measure="memory", best=best)
    bounded = any(r.get("speedup_forward") and r.get("speedup_bound") for r in rows)
    if bounded and not (learns and sized):  # `shapes` shows the mechanism without a network around it
        add(
            "Measured beside possible",
            "How much faster than full attention its forward pass is, and how much its FLOPs would allow.",
            plots.prediction(rows, best=best),
        )
    if any(r.get("memory_bytes") for r in rows):
        add(
            "Peak memory",
            "One forward and backward pass; the dashed line is full attention.",
            plots.bars(rows, field="memory_bytes", best=best, label="peak memory"),
        )
    if found and len([f for f in found if not f["wide"]]) % 2:
        found[-1]["wide"] = "wide solo"
    return found


def _crossovers(rows: list[Row]) -> list[dict[str, str]]:
    """Systems that scan: what a token costs, and from which length they pay, predicted and measured."""
    found = [r for r in rows if "crossover_predicted" in r]
    found.sort(key=lambda r: (r["crossover_predicted"] or float("inf"), r["mechanism"]))
    return [
        {
            "key": row["mechanism"],
            "flops": f"{number(row['flops_per_token'] / 1e3)} k" if row.get("flops_per_token") else "–",
            "state": byte_words(row["state_bytes"]) if row.get("state_bytes") else "–",
            "predicted": f"{row['crossover_predicted']:,}" if row["crossover_predicted"] else "not counted",
            "measured": crossing_words(row),
        }
        for row in found
    ]


def _section(document: Mapping[str, Any], workload: str, best: str | None) -> dict[str, Any]:
    every = [r for r in document["rows"] if r["workload"] == workload]
    rows = [r for r in every if r["status"] == "measured"]
    info = document["workloads"].get(workload, {})
    learns = workload in LEARNING
    sized = any(r["workload"] == "shapes" and r["status"] == "measured" for r in document["rows"])
    slower: dict[str, list[str]] = {}
    for row in rows:
        for at in row.get("slower_than_dense") or []:
            slower.setdefault(at, []).append(row["mechanism"])
    size = grid_words(info.get("measured_grid") or info.get("grid", ()))
    facts = [f"{size} tokens" if size else "", f"batch {info['batch']}" if info.get("batch") else ""]
    if learns and info.get("floor") is not None:
        facts.append(f"best trivial answer ({words(info.get('floor_name') or '')}): {number(info['floor'])}")
    return {
        "key": workload,
        "title": info.get("title") or workload,
        "facts": [f for f in facts if f],
        "figures": _figures(rows, info, best, learns=learns, sized=sized) if rows else [],
        "table": _table(rows, best),
        "slower": slower,
        "crossovers": _crossovers(rows),
        "others": [r for r in every if r["status"] != "measured"],
    }


def _marked(text: str) -> str:
    """`code` marks and N^p as HTML, everything else escaped."""
    parts = re.sub(r"N\^(-?[\d.]*\d)", r"N<sup>\1</sup>", escape(text)).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _breakable(key: str) -> str:
    """A key that may go over to the next line at its underscores."""
    return escape(key).replace("_", "_<wbr>")


def _stats(document: Mapping[str, Any], choice: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that stand beside the headline."""
    rows = {(r["workload"], r["mechanism"]): r for r in document["rows"] if r["status"] == "measured"}
    own = rows.get((choice["workload"], choice["mechanism"]), {})
    sized = rows.get(("shapes", choice["mechanism"]), own)
    info = document["workloads"].get(choice["workload"], {})
    found = []
    if choice["basis"] == "quality":
        found.append({"name": str(info.get("metric") or "quality"), "value": quality_words(own)})
    if sized.get("speedup") and choice["mechanism"] != BASELINE:
        found.append({"name": "the speed of full attention", "value": f"{number(sized['speedup'], 2)}×"})
    if sized.get("step_ms"):
        found.append({"name": "forward + backward", "value": milliseconds(sized["step_ms"])})
    if sized.get("memory_ratio") and choice["mechanism"] != BASELINE:
        found.append({"name": "of full attention's memory", "value": f"{100 * sized['memory_ratio']:.0f} %"})
    if sized.get("exponent") is not None:
        found.append({"name": "growth of its time", "value": f"N^{sized['exponent']:.2f}"})
    return found


def render(document: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        document: the parsed results.json.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise need_extra("jinja2", "compare") from None
    environment = Environment(
        loader=PackageLoader("foveate.advise"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"breakable": _breakable, "words": words, "marked": _marked, "bytes": byte_words}
    choices = document["recommendations"]
    by_workload = {c["workload"]: c["mechanism"] for c in choices}
    names = list(dict.fromkeys(r["workload"] for r in document["rows"]))
    names.sort(key=lambda name: name not in LEARNING)
    pictured: dict[str, Row] = {}
    for row in document["rows"]:
        if row.get("reach") and row["status"] == "measured" and row["mechanism"] not in pictured:
            pictured[row["mechanism"]] = row
    headline = choices[0] if choices else None
    gallery = [
        {
            "key": key,
            "family": row.get("family") or "",
            "cls": plots.family_class(row),
            "cost": row.get("cost") or "",
            "paper": row.get("paper") or "",
            "svg": reach_picture(row["reach"], label=f"whom the middle token of {words(key)} listens to"),
        }
        for key, row in sorted(pictured.items())
    ]
    hero = pictured.get(headline["mechanism"]) if headline else None
    return environment.get_template("report.html.j2").render(
        document=document,
        headline=headline,
        hero=reach_picture(hero["reach"], label="whom its middle token listens to", px=180) if hero else "",
        stats=_stats(document, headline) if headline else [],
        others=choices[1:],
        sections=[_section(document, name, by_workload.get(name)) for name in names],
        gallery=gallery,
        families=sorted({g["family"] for g in gallery}),
        machine=document["fingerprint"],
        settings=document["settings"],
    )


def write_report(document: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path` in one step and return it."""
    write_atomically(path, render(document))
    return path
