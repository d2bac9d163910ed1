"""Errors that name the argument, the value it got, what was expected and what to do.

Every message a user can cause is built here, so that all of them read alike.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FoveateError(Exception):
    """Base of everything foveate raises on purpose."""


class ArgumentError(FoveateError, ValueError):
    """An argument has a value that cannot mean anything here."""


class UnsupportedError(FoveateError, RuntimeError):
    """The request is meaningful, but the backend or mechanism that was named cannot serve it."""


class UnknownNameError(FoveateError, ValueError):
    """A name is not in the table it was looked up in."""


class MissingExtraError(FoveateError, ImportError):
    """An optional dependency is not installed."""


def bad(name: str, got: object, expected: str, hint: str = "") -> ArgumentError:
    """Return (not raise) the error for argument `name`, so that call sites read `raise bad(...)`.

    Args:
        name: the argument as the user wrote it.
        got: the value, or the part of it that is wrong; shown with `repr`.
        expected: what would have been right, as a phrase.
        hint: what to do about it, as a sentence.
    """
    message = f"{name}: expected {expected}, got {got!r}."
    return ArgumentError(f"{message} {hint}" if hint else message)


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a `name` that is no `kind`, with the nearest names that are."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    listed = near or known[:12]
    lead = "Did you mean" if near else "Known names include"
    tail = "?" if near else "."
    return UnknownNameError(f"{kind} {name!r} is not known. {lead} {', '.join(map(repr, listed))}{tail}")


def need_extra(module: str, extra: str) -> MissingExtraError:
    """Return the error for a missing optional `module`, with the exact pip line that brings it."""
    return MissingExtraError(
        f"this needs the Python module {module!r}, which is not installed. "
        f"Run: pip install 'foveate[{extra}]'"
    )
