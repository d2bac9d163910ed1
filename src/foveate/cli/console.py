"""How commands speak: one console, and errors as sentences instead of tracebacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from foveate.core.errors import FoveateError

BAD_INPUT = 2
INTERRUPTED = 130

T = TypeVar("T", bound=Callable[..., None])


def stdout() -> Console:
    """The console of results; made anew so that redirected streams are respected."""
    return Console(highlight=False)


def stderr() -> Console:
    """The console of complaints."""
    return Console(stderr=True, highlight=False)


def friendly(command: T) -> T:
    """Turn our own errors into a sentence and exit code 2, Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            command(*args, **kwargs)
        except FoveateError as error:
            stderr().print(f"[bold red]foveate:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            stderr().print("[bold red]foveate:[/] interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run  # type: ignore[return-value]
