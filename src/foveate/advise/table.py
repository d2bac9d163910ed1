"""The figures as a table for terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from foveate.advise.settings import BASELINE
from foveate.advise.svg import byte_words, grid_words, milliseconds, number

Row = Mapping[str, Any]


def quality_words(row: Row) -> str:
    """The quality cell: the figure with its error, or that it is not resolved."""
    if row.get("quality") is None:
        return ""
    if row.get("resolved") is False:
        return "not resolved in this budget"
    se = row.get("quality_se")
    return number(row["quality"]) + (f" ± {number(se, 2)}" if se else "")


def _or_blank(value: float | None, word) -> str:
    return "" if value is None else word(value)


def order(row: Row) -> tuple:
    """Sorting key of rows: measured first, by rank in quality, then by time."""
    return (
        row["status"] != "measured",
        row.get("rank") or 99,
        row.get("resolved") is False,
        -(row.get("steps") or 0),
        row.get("step_ms") or float("inf"),
        row["mechanism"],
    )


def rich_table(document: Mapping[str, Any], workload: str) -> Table:
    """The rows of one workload as a rich table, best first; those without figures carry their reason.

    Args:
        document: the parsed results.json.
        workload: which rows.
    """
    rows = sorted((r for r in document["rows"] if r["workload"] == workload), key=order)
    info = document["workloads"].get(workload, {})
    best = next((r["mechanism"] for r in document["recommendations"] if r["workload"] == workload), None)
    size = grid_words(info.get("measured_grid") or info.get("grid", ()))
    table = Table(title=f"{workload}: {info.get('title', '')}  [{size}]", title_justify="left", expand=False)
    learns = any(r.get("quality") is not None for r in rows)
    table.add_column("mechanism", no_wrap=True)
    if learns:
        table.add_column(str(info.get("metric") or "quality"), justify="right")
        table.add_column("steps x seeds", justify="right")
    for name in ("forward", "backward", "vs full", "bound", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("params" if learns else "growth", justify="right", no_wrap=True)
    for row in rows:
        mark = "bold green" if row["mechanism"] == best else "" if row["status"] == "measured" else "dim"
        cells = [row["mechanism"]]
        if row["status"] != "measured":
            reason = f"{row['status']}: {row['reason']}"
            table.add_row(*cells, reason if len(reason) < 60 else reason[:57] + "...", style=mark)
            continue
        if learns:
            cells += [quality_words(row), f"{row.get('steps') or 0} x {row.get('seeds') or 0}"]
        speed = "" if row["mechanism"] == BASELINE else _or_blank(row.get("speedup"), lambda s: f"{s:.2f}x")
        bound = (
            "" if row["mechanism"] == BASELINE else _or_blank(row.get("speedup_bound"), lambda s: f"{s:.2f}x")
        )
        cells += [
            _spread(row, "forward"),
            _spread(row, "backward"),
            speed,
            bound,
            _or_blank(row.get("memory_bytes"), byte_words),
        ]
        growth = _or_blank(row.get("exponent"), lambda p: f"N^{p:.2f}")
        cells.append(f"{row['params']:,}" if learns and row.get("params") else growth)
        table.add_row(*cells, style=mark)
    return table


def _spread(row: Row, which: str) -> str:
    value, spread = row.get(f"{which}_ms"), row.get(f"{which}_spread_ms")
    if value is None:
        return ""
    return milliseconds(value) + (f" ±{number(spread / 2, 2)}" if spread else "")


def plain_table(document: Mapping[str, Any], workload: str | None = None, width: int = 150) -> str:
    """The tables as plain text, of one workload or of all in the document."""
    names = (
        [workload] if workload is not None else list(dict.fromkeys(r["workload"] for r in document["rows"]))
    )
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        for name in names:
            console.print(rich_table(document, name))
    return captured.get()
