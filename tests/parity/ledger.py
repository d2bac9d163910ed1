"""Every exception from the parity tolerances, each with its reason.

`test_parity.py` proves that each entry is still needed: without it the comparison fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One exception.

    Attributes:
        vector: shell pattern over `key.part[case]`; brackets are escaped as `[[]`.
        tensor: shell pattern over tensor names.
        reason: why our value is right and differs, or why the stored one cannot be compared.
        factor: tolerance is multiplied by this; None means the tensor is not compared.
        applies: whether a configuration is concerned; an entry without open vectors must have it.
    """

    vector: str
    tensor: str
    reason: str
    factor: float | None = None
    applies: Callable[[dict[str, Any]], bool] | None = None


LEDGER: tuple[Entry, ...] = ()


def find(vector: str, tensor: str, config: dict[str, Any], ledger: tuple[Entry, ...]) -> Entry | None:
    """Return the entry that covers a tensor of a vector, if any."""
    for entry in ledger:
        named = fnmatchcase(vector, entry.vector) and fnmatchcase(tensor, entry.tensor)
        if named and (entry.applies is None or entry.applies(config)):
            return entry
    return None
