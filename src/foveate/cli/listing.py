"""`foveate list` and `foveate show KEY`: the register of systems."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from foveate.cli.console import friendly, stdout
from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import Facts, get_system, list_systems

# Sides of the grid a picture is found on, by number of axes; the first that the system takes is used.
_PICTURE_GRIDS = (Grid(24, 24), Grid(16, 16), Grid(64), Grid(8, 8, 8))
# Where the cost of a scan is told: as many tokens on either, so that figures compare.
_COST_GRIDS = (Grid(4096), Grid(64, 64))
_SHADES = " ·░░▒▒▒▓▓█"


def as_record(facts: Facts) -> dict[str, Any]:
    """The declared facts as JSON values."""
    found = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name != "cls"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


@friendly
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell wildcard over keys, such as '*neighborhood*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    role: Annotated[str | None, typer.Option(help="Only this role.")] = None,
    fidelity: Annotated[str | None, typer.Option(help="Only vectors, code, paper or reconstruction.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All facts, for programs.")] = False,
) -> None:
    """List the attention systems that are known."""
    found = list_systems(pattern, family=family, role=role, fidelity=fidelity)
    if as_json:
        typer.echo(json.dumps([as_record(facts) for facts in found], indent=1, ensure_ascii=False))
        return
    console = stdout()
    if not found:
        console.print("No system matches. `foveate list` without filters shows all.")
        raise typer.Exit(1)
    names = ("key", "family", "causal", "fidelity", "year")
    widths = {n: max(len(n), *(len(str(getattr(facts, n))) for facts in found)) for n in names}
    # Keys are what users copy: only the title gives way on a narrow screen. A frame takes three cells.
    room = max(12, console.width - sum(widths.values()) - 3 * (len(names) + 1) - 1)
    table = Table()
    for name in (*names, "title"):
        table.add_column(name, no_wrap=True)
    for facts in found:
        title = facts.title if len(facts.title) <= room else f"{facts.title[: room - 1]}…"
        table.add_row(*(escape(str(getattr(facts, n))) for n in names), escape(title))
    console.print(table)
    console.print(f"{len(found)} systems. `foveate show KEY` tells more about one.")


def _picture(facts: Facts) -> tuple[Grid, list[int]] | None:
    """Whom the middle token listens to, on the first grid the system takes."""
    import torch

    from foveate.measure.reach import reach_levels
    from foveate.measure.subject import Subject

    for grid in _PICTURE_GRIDS:
        if grid.ndim not in facts.dims or not hasattr(facts.cls, "for_workload"):
            continue
        torch.manual_seed(0)
        for causal in (False, True):
            try:
                subject = Subject.build(facts, dim=32, grid=grid, heads=2, causal=causal)
            except (ArgumentError, UnsupportedError):
                continue
            return grid, reach_levels(subject)
    return None


def _cost(facts: Facts) -> list[str]:
    """What a system that scans costs beside full attention, as lines; none for others."""
    from foveate.cost.linear import explain_linear, scans

    if not scans(facts.key):
        return []
    grid = _COST_GRIDS[0] if 1 in facts.dims else _COST_GRIDS[1]
    try:
        cost = explain_linear(facts.key, dim=512, grid=grid, heads=8)
    except (ArgumentError, UnsupportedError):
        return []
    return ["", *str(cost).splitlines()]


def _shaded(grid: Grid, levels: list[int]) -> list[str]:
    rows, cols = (1, grid[0]) if grid.ndim == 1 else grid.sizes[-2:]
    start = 0 if grid.ndim < 3 else (grid[0] // 2) * rows * cols
    lines = []
    for r in range(rows):
        cells = levels[start + r * cols : start + (r + 1) * cols]
        lines.append("".join(_SHADES[level] * 2 for level in cells))
    return lines


@friendly
def show(
    key: Annotated[str, typer.Argument(help="Key of the system; `foveate list` shows them.")],
    svg: Annotated[Path | None, typer.Option(help="Also write the picture to this SVG file.")] = None,
) -> None:
    """Show one system: paper, idea, equation, facts and a picture of whom it listens to."""
    facts = get_system(key)
    console = stdout()
    console.print(f"[bold]{facts.key}[/]  {escape(facts.paper)}", soft_wrap=True)
    if facts.arxiv:
        console.print(f"[dim]https://arxiv.org/abs/{facts.arxiv}[/]")
    console.print()
    console.print(escape(facts.doc), soft_wrap=True)
    console.print()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in as_record(facts).items():
        if name not in ("key", "title", "arxiv", "year") and value not in ("", []):
            said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(f"[dim]{name}[/]", escape(said))
    console.print(table)
    for line in _cost(facts):
        console.print(escape(line), soft_wrap=True)
    picture = _picture(facts)
    if picture is None:
        return
    grid, levels = picture
    console.print(f"\nwhom the middle token of {grid} listens to:")
    for line in _shaded(grid, levels):
        console.print(line, soft_wrap=True, markup=False)
    if svg is not None:
        from foveate.advise.reach import reach_file

        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(reach_file({"grid": list(grid.sizes), "levels": levels}, key), encoding="utf-8")
        console.print(f"picture  {escape(str(svg))}", soft_wrap=True)
