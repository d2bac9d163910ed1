"""The picture of a recall study: mass captured, and error, against computed pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.core.errors import bad, need_extra
from foveate.study.records import Recall, Row

FORMATS = (".png", ".svg", ".pdf")
_ORACLE, _RANDOM = "#1b1f23", "#9aa4ab"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MARKS = "osD^vP*X<>hd"


def draw(found: Recall, title: str = "") -> Any:
    """Draw means over layers: the oracle a black line, random choices a dashed one, every family its own.

    Content routers have full lines and static patterns dotted ones.

    Returns:
        The matplotlib figure.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib", "compare") from None
    whole = found.mean()
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    families: dict[tuple[str, str], list[Row]] = {}
    for row in whole.rows:
        families.setdefault((row.family, row.kind), []).append(row)
    for ax, name in ((left, "mass"), (right, "error")):
        for rule, colour, style in (("oracle", _ORACLE, "-"), ("random", _RANDOM, "--")):
            line = sorted((x for x in whole.references if x.rule == rule), key=lambda x: x.pairs)
            ax.plot([x.pairs for x in line], [getattr(x, name) for x in line], style, color=colour, label=rule,
                    linewidth=2)  # fmt: skip
        for i, ((family, kind), rows) in enumerate(families.items()):
            rows = sorted(rows, key=lambda row: row.computed)
            ax.plot([row.computed for row in rows], [getattr(row, name) for row in rows],
                    "-" if kind == "content" else ":", color=f"C{i % 10}", marker=_MARKS[i % len(_MARKS)],
                    markersize=5, linewidth=1.4, label=family)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks(_TICKS, [f"{100 * tick:g}%" for tick in _TICKS])
        ax.minorticks_off()
        ax.set_xlabel("computed pairs, share of N x N")
        ax.grid(alpha=0.25)
    left.set_ylim(0, 1)
    left.set_ylabel("share of full attention's mass captured")
    right.set_yscale("log")
    right.set_ylabel("relative L2 error of the output")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def save(found: Recall, path: str | Path, title: str = "") -> Path:
    """Draw into a file; its ending says the format.

    Raises:
        ArgumentError: naming `path` when the ending is no format.
        MissingExtraError: if matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise bad("path", str(path), f"a file that ends with one of {', '.join(FORMATS)}")
    figure = draw(found, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same study gives the same file.
    figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
