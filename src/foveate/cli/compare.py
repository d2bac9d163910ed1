"""`foveate compare`: race, time and rank the mechanisms, and write results.json and report.html."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from foveate.cli.console import INTERRUPTED, friendly, stdout
from foveate.core.errors import need_extra

# Modules of the extra [compare] that a workload or the report cannot do without.
_NEEDED = {"report": "jinja2", "image": "sklearn", "restore": "skimage"}


def _split(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def _check_extras(workloads: list[str]) -> None:
    """Complain before anything is measured rather than after."""
    for name in ("report", *workloads):
        module = _NEEDED.get(name)
        if module is not None and find_spec(module) is None:
            raise need_extra(module, "compare")


@friendly
def compare(
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", help="image, restore, text, recall, shapes or all."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds for everything; 270 by default, and 9 for every mechanism above 16."),
    ] = None,
    mechanisms: Annotated[
        list[str] | None,
        typer.Option(
            "--mechanisms", "-m", help="Only these keys, families or wildcards, and full attention."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("compare"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run found in --out.")] = False,
    grid: Annotated[str, typer.Option(help="Token grid that shapes times, such as 64x64 or 4096.")] = "64x64",
    heads: Annotated[int, typer.Option(help="Heads that shapes times.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    batch: Annotated[int, typer.Option(help="Samples at once in shapes.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="Your folder of images (image, restore) or text file (text).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data, parameters and inputs.")] = 0,
) -> None:
    """Find the attention mechanism that suits your workload on this machine."""
    from foveate.advise.compare import REPORT_NAME
    from foveate.advise.compare import compare as run
    from foveate.advise.settings import DEFAULT_WORKLOADS, Shape, parse_grid
    from foveate.cli.progress import ComparisonProgress
    from foveate.tasks.workload import workload_keys

    chosen = _split(workload) or list(DEFAULT_WORKLOADS)
    if "all" in chosen:
        chosen = workload_keys()
    _check_extras(chosen)
    console = stdout()
    with ComparisonProgress(console) as progress:
        found = run(
            chosen,
            budget_s=budget,
            mechanisms=_split(mechanisms) or None,
            device=device,
            dtype=dtype,
            threads=threads,
            shape=Shape(grid=parse_grid(grid), heads=heads, head_dim=head_dim, batch=batch),
            data=data,
            seed=seed,
            out=out,
            resume=resume,
            listener=progress,
        )
    report = found.to_html(out / REPORT_NAME)
    _print(console, found, report)
    if found.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if found.errors or found.best is None:
        raise typer.Exit(1)


def _print(console: Console, found, report: Path) -> None:
    """Tables, recommendation and where the files are."""
    from foveate.advise.table import rich_table

    for name in dict.fromkeys(row["workload"] for row in found.rows):
        console.print()
        console.print(rich_table(found.document, name, width=console.width))
    console.print()
    for name, error in found.errors.items():
        console.print(f"[red]{name} stopped:[/] {escape(error)}", soft_wrap=True)
    if found.recommendations:
        choice = found.recommendations[0]
        lines = [f"[bold]{escape(choice['headline'])}[/]", ""]
        lines += [f"- {escape(reason)}" for reason in choice["reasons"]]
        lines += [f"[dim]- {escape(caveat)}[/]" for caveat in choice["caveats"]]
        if choice.get("code"):
            lines += ["", *(f"    {escape(line)}" for line in choice["code"].rstrip().splitlines())]
        box = Panel("\n".join(lines), title="recommendation", title_align="left", border_style="green")
        console.print(box)
    if found.status == "interrupted":
        console.print("Interrupted: what was finished is kept; --resume goes on from it.")
    console.print(f"report   {escape(str(report))}", soft_wrap=True)
    console.print(f"results  {escape(str(report.with_name('results.json')))}", soft_wrap=True)
