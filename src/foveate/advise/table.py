"""The figures as a table for terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.advise.settings import BASELINE
from foveate.advise.svg import byte_words, grid_words, milliseconds, number

Row = Mapping[str, Any]
# Cells a terminal needs for every column.
WIDE = 120


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


def rich_table(document: Mapping[str, Any], workload: str, *, width: int = 150) -> Table:
    """The rows of one workload as a rich table, best first; those without figures carry their reason.

    Args:
        document: the parsed results.json.
        workload: which rows.
        width: cells of the terminal; below `WIDE`, only the columns that matter most are shown.
    """
    rows = sorted((r for r in document["rows"] if r["workload"] == workload), key=order)
    info = document["workloads"].get(workload, {})
    best = next((r["mechanism"] for r in document["recommendations"] if r["workload"] == workload), None)
    size = grid_words(info.get("measured_grid") or info.get("grid", ()))
    title = f"[bold]{workload}[/]: {escape(str(info.get('title', '')))}  \\[{size}]"
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    learns = any(r.get("quality") is not None for r in rows)
    columns = _columns(learns, str(info.get("metric") or "quality"), width >= WIDE)
    table.add_column("mechanism", no_wrap=True)
    for name, _ in columns:
        if learns and name == columns[0][0]:
            # Room for a figure with its error; "not resolved in this budget" may take two lines.
            table.add_column(name, justify="right", min_width=15)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    without = []
    for row in rows:
        if row["status"] != "measured":
            without.append(row)
            continue
        style = "bold green" if row["mechanism"] == best else ""
        table.add_row(row["mechanism"], *(cell(row) for _, cell in columns), style=style)
    if without:
        said = [f"{r['mechanism']} {r['status']}: {r['reason']}" for r in without]
        table.caption = escape("\n".join(said))
        table.caption_justify = "left"
    return table


def _columns(learns: bool, metric: str, wide: bool) -> list[tuple[str, Callable[[Row], str]]]:
    """Headings, and what writes their cells."""
    found: list[tuple[str, Callable[[Row], str]]] = []
    if learns:
        found.append((metric, quality_words))
        if wide:
            found.append(("steps", lambda r: f"{r.get('steps') or 0} x {r.get('seeds') or 0}"))
    if learns and not wide:
        found.append(("step", lambda r: _or_blank(r.get("step_ms"), milliseconds)))
    else:
        found.append(("forward", lambda r: _time(r, "forward", wide)))
        found.append(("backward", lambda r: _time(r, "backward", wide)))
    found.append(("vs full", lambda r: _ratio(r, "speedup")))
    if wide:
        found.append(("bound", lambda r: _ratio(r, "speedup_bound")))
        if not learns:
            found.append(("core vs tiles", lambda r: _ratio(r, "core_gain")))
    found.append(("memory", lambda r: _or_blank(r.get("memory_bytes"), byte_words)))
    if not learns:
        found.append(("growth", lambda r: _or_blank(r.get("exponent"), lambda p: f"N^{p:.2f}")))
    elif wide:
        found.append(("params", lambda r: _or_blank(r.get("params"), lambda n: f"{n:,}")))
    return found


def _ratio(row: Row, field: str) -> str:
    return "" if row["mechanism"] == BASELINE else _or_blank(row.get(field), lambda s: f"{s:.2f}x")


def _time(row: Row, which: str, wide: bool) -> str:
    value, spread = row.get(f"{which}_ms"), row.get(f"{which}_spread_ms")
    if value is None:
        return ""
    return milliseconds(value) + (f" ±{number(spread / 2, 2)}" if spread and wide else "")


def plain_table(document: Mapping[str, Any], workload: str | None = None, width: int = 150) -> str:
    """The tables as plain text, of one workload or of all in the document."""
    names = (
        [workload] if workload is not None else list(dict.fromkeys(r["workload"] for r in document["rows"]))
    )
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        for name in names:
            console.print(rich_table(document, name, width=width))
    return captured.get()
