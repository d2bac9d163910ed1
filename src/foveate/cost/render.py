"""How an Explanation looks: as plain text and as a rich table, from one list of rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.cost.explain import Explanation


def amount(x: float, unit: str = "") -> str:
    """Write a large number with three digits and a prefix: 12.3 M, 4.56 GFLOP."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= factor:
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}".rstrip()


def bound(x: float) -> str:
    """Write a speed-up; without any pair there is no bound."""
    return "no pair is computed" if math.isinf(x) else f"{x:.3g}x"


def rows(e: Explanation) -> list[tuple[str, str]]:
    """Return (label, text) for everything but the reasons."""
    cells = e.full_tiles + e.partial_tiles
    sizes = f"{e.n_q} queries x {e.n_k} keys, d {e.d}/{e.d_v}"
    both = f"{bound(e.speedup_bound)} forward, {bound(e.speedup_bound_backward)} forward+backward"
    tile = "" if e.tile is None else f", {'x'.join(map(str, e.tile))} queries each"
    return [
        ("where", e.where),
        ("problem", f"batch {e.batch}, {e.heads} heads, {sizes}, {e.dtype} on {e.device}"),
        ("backend", f"{e.backend} ({e.detail})" if e.detail else e.backend),
        ("pairs needed", f"{amount(e.pairs_needed)} ({e.needed_share:.2%} of dense)"),
        ("pairs computed", f"{amount(e.pairs_computed)} ({e.computed_share:.2%} of dense)"),
        ("pairs dense", amount(e.pairs_dense)),
        ("tiles", f"{e.full_tiles} full, {e.partial_tiles} partial{tile}" if cells else "none"),
        ("arithmetic", f"{amount(e.flops, 'FLOP')} forward, {amount(e.flops_backward, 'FLOP')} backward"),
        ("memory moved", f"{amount(e.bytes, 'B')} at least"),
        ("speed-up bound", f"{both}, over dense"),
    ]


def as_text(e: Explanation) -> str:
    """Return the table as plain text."""
    lines = [f"{label:>15}  {text}" for label, text in rows(e)]
    lines += [f"{'not ' + name:>15}  {reason}" for name, reason in e.reasons.items()]
    return "\n".join(lines)


def as_rich(e: Explanation) -> Any:
    """Return the table for rich."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right", style="bold")
    table.add_column(overflow="fold")
    for label, text in rows(e):
        strong = label in ("backend", "speed-up bound")
        table.add_row(label, f"[bold]{escape(text)}[/]" if strong else escape(text))
    for name, reason in e.reasons.items():
        table.add_row(f"not {name}", escape(reason), style="dim")
    return table
