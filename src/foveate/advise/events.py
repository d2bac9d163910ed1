"""What a comparison tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: "begin" and "end" of a workload, "progress" within it, "row" for a finished row, "note".
        workload: its key.
        fraction: share of the workload's time that is spent, 0 to 1.
        message: one sentence for people.
        row: the finished row, for "row".
    """

    kind: str
    workload: str = ""
    fraction: float = 0.0
    message: str = ""
    row: dict[str, Any] | None = None


Listener = Callable[[Event], None]


def nobody(event: Event) -> None:
    """A listener that does not listen."""
