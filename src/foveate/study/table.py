"""A recall study as a table of the terminal, and as the few sentences that matter."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from foveate.study.records import Recall

# Cells a terminal needs for every column.
WIDE = 118


def share(value: float) -> str:
    """Write a share as per cent with two or three digits that mean something."""
    per_cent = 100 * value
    return f"{per_cent:.2f}%" if per_cent < 1 else f"{per_cent:.1f}%"


def rich_table(found: Recall, title: str, *, width: int = 150) -> Table:
    """Return one layer, or means over layers (`found.mean()`), families in order, cheap members first.

    Bold green captures more than everything that computes no more pairs.

    Args:
        found: the study.
        title: what stands above.
        width: cells of the terminal; below `WIDE` only the columns that matter most are shown.
    """
    wide = width >= WIDE
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False,
                  collapse_padding=True)  # fmt: skip
    names = ["computed", "mass", "oracle", "error"]
    if wide:
        names = ["kept", "computed", "choosing", "mass", "worst 10%", "oracle", "random", "error"]
    _columns(table, "candidate", names, width)
    best = found.frontier()
    families = dict.fromkeys(row.family for row in found.rows)
    for family in families:
        rows = sorted((row for row in found.rows if row.family == family), key=lambda row: row.computed)
        table.add_row(f"[bold]{escape(family)}[/] [dim]{rows[0].kind}[/]", *[""] * len(names))
        for row in rows:
            cells = {
                "kept": share(row.pairs),
                "computed": share(row.computed),
                "choosing": share(row.choosing) if row.choosing else "",
                "mass": share(row.mass),
                "worst 10%": share(row.mass_worst_decile),
                "oracle": share(row.oracle),
                "random": share(row.random),
                "error": f"{row.error:.3f}",
            }
            style = "bold green" if (row.layer, row.candidate) in best else ""
            table.add_row(f"  {escape(row.candidate)}", *(cells[name] for name in names), style=style)
    return table


def _columns(table: Table, first: str, names: Sequence[str], width: int) -> None:
    """Add columns: labels give way on a narrow screen, figures do not."""
    widths = [max(len(name), 6) for name in names]
    room = max(12, width - sum(widths) - 2 * len(widths) - 2)
    table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=room)
    for name, least in zip(names, widths, strict=True):
        table.add_column(escape(name), justify="right", no_wrap=True, min_width=least)


def layers_table(found: Recall, *, width: int = 150) -> Table:
    """Return the mass captured layer by layer, at the member of each family nearest to a tenth of the pairs."""
    table = Table(title="mass captured, layer by layer", title_justify="left", title_style="", box=SIMPLE_HEAD,
                  pad_edge=False, collapse_padding=True)  # fmt: skip
    _columns(table, "computed, candidate", found.layers, width)
    for family in dict.fromkeys(row.family for row in found.rows):
        members = [row for row in found.mean().rows if row.family == family]
        chosen = min(members, key=lambda row: abs(row.computed - 0.1))
        by_layer = {row.layer: row for row in found.rows if row.candidate == chosen.candidate}
        cells = [share(by_layer[layer].mass) if layer in by_layer else "" for layer in found.layers]
        # The share first: a long label loses its end.
        table.add_row(f"{share(chosen.computed):>6} {escape(chosen.candidate)}", *cells)
    return table


def sentences(found: Recall, mass: float = 0.9) -> list[str]:
    """Return what the study says: who captures `mass` with the fewest pairs, and how far that is from the best.

    Args:
        found: one layer, or means over layers.
        mass: the share asked for; where nobody reaches it, the best is named.
    """
    if not found.rows:
        return []
    oracle = next((x for x in sorted(found.references, key=lambda x: x.pairs)
                   if x.rule == "oracle" and x.mass >= mass), None)  # fmt: skip
    said = []
    if oracle is not None:
        said.append(
            f"The best {share(oracle.pairs)} of the pairs would hold {share(oracle.mass)} of the mass."
        )
    ranked = sorted(found.cheapest(mass).values(), key=lambda row: row.computed)
    if not ranked:
        row = max(found.rows, key=lambda row: row.mass)
        said.append(f"Nobody captured {share(mass)}; the most is {share(row.mass)}, by {row.candidate} "
                    f"({row.family}) with {share(row.computed)} of the pairs.")  # fmt: skip
    for row in ranked[:3]:
        said.append(f"{row.candidate} ({row.family}) captures {share(row.mass)} with {share(row.computed)} of "
                    f"the pairs, error {row.error:.3f}.")  # fmt: skip
    if any(row.choosing > 1 for row in found.rows):
        names = dict.fromkeys(row.family for row in found.rows if row.choosing > 1)
        said.append(f"Choosing costs more than all products q.k for some of: {', '.join(names)}.")
    return said
