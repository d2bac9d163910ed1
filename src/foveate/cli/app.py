"""The command `foveate`. Commands parse, call and print; what they print is computed in the rooms below."""

from __future__ import annotations

import typer

from foveate.cli.compare import compare
from foveate.cli.doctor import doctor
from foveate.cli.explain import explain
from foveate.cli.listing import list_command, show
from foveate.cli.recall import recall

app = typer.Typer(
    name="foveate",
    help="Find the right attention for a workload, prove it on your machine, drop it into your model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compare")(compare)
app.command("list")(list_command)
app.command("show")(show)
app.command("explain")(explain)
app.command("recall")(recall)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of the console script and of `python -m foveate`."""
    app(prog_name="foveate")
