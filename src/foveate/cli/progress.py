"""Live progress of a comparison: one bar per workload, one line per thing worth keeping on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from foveate.advise.events import Event


class ComparisonProgress:
    """A listener for `advise.compare`; use it as a context manager around the call.

    Args:
        console: where to draw. Without a terminal the bars are left out and the lines stay.
    """

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.fields[name]:8}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ComparisonProgress:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if event.kind == "begin":
            self.tasks[event.workload] = self.progress.add_task("", name=event.workload, total=1.0)
            self._say(f"[bold]{event.workload}[/] begins")
        elif event.kind == "end":
            self._bar(event.workload, 1.0, "done")
        elif event.kind == "progress":
            self._bar(event.workload, event.fraction, event.message)
        elif event.kind == "note":
            lead = f"[dim]{event.workload}[/] " if event.workload else ""
            self._say(lead + escape(event.message))
        elif event.kind == "row" and event.row is not None and event.row["status"] != "measured":
            row = event.row
            self._say(
                f"[dim]{event.workload}[/] {row['mechanism']} "
                f"[yellow]{row['status']}[/]: [dim]{escape(row['reason'])}[/]"
            )

    def _bar(self, workload: str, fraction: float, message: str) -> None:
        if workload in self.tasks:
            said = escape(message) if message else None
            self.progress.update(self.tasks[workload], completed=fraction, description=said)

    def _say(self, line: str) -> None:
        self.progress.console.print(line, soft_wrap=True)
