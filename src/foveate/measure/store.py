"""results.json on disk: every finished row is written at once and whole, so that nothing finished is lost."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError
from foveate.measure.schema import ROW, SCHEMA, SCHEMA_VERSION, validate

FILE_NAME = "results.json"


class StoreError(FoveateError, ValueError):
    """A results.json that cannot be read or gone on with."""


def plain(value: Any) -> Any:
    """Make a value fit for JSON: tuples become lists, NaN and infinities become null, keys strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def empty_row(workload: str, mechanism: str, status: str, reason: str = "", **more: Any) -> dict[str, Any]:
    """A row with every required field present; figures are null until given in `more`."""
    row = {field.name: None for field in ROW if field.required}
    row |= {"workload": workload, "mechanism": mechanism, "status": status, "reason": reason}
    return row | more


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


class Store:
    """The document of one run, kept in memory and, with a `path`, on disk after every change.

    Args:
        path: the file, or None for a run that leaves nothing behind.
        fingerprint, settings: stored as they are.
    """

    def __init__(self, path: Path | None, *, fingerprint: dict[str, Any], settings: dict[str, Any]):
        self.path = path
        self._waiting = False
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created": _now(),
            "updated": _now(),
            "status": "running",
            "fingerprint": plain(fingerprint),
            "settings": plain(settings),
            "workloads": {},
            "rows": [],
            "races": {},
            "recommendations": [],
        }

    @classmethod
    def load(cls, path: Path) -> Store:
        """Read a file that `Store` wrote.

        Raises:
            StoreError: if it is missing, is not JSON, or does not follow the schema.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"no {path.name} in {path.parent}: there is no run to go on with.") from None
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}). Choose another --out.") from error
        problems = validate(document)
        if problems:
            raise StoreError(f"{path} does not follow the schema: {problems[0]}. Choose another --out.")
        store = cls(path, fingerprint=document["fingerprint"], settings=document["settings"])
        store.document = {**store.document, **document}
        return store

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order they were first put."""
        return self.document["rows"]

    def row(self, workload: str, mechanism: str) -> dict[str, Any] | None:
        """The row of one workload and mechanism, or None."""
        for row in self.rows:
            if row["workload"] == workload and row["mechanism"] == mechanism:
                return row
        return None

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace the row of its workload and mechanism, and write."""
        row = plain(row)
        for i, old in enumerate(self.rows):
            if (old["workload"], old["mechanism"]) == (row["workload"], row["mechanism"]):
                self.rows[i] = row
                break
        else:
            self.rows.append(row)
        self.save()

    def update(self, **fields: Any) -> None:
        """Set fields of the document, and write."""
        for name, value in fields.items():
            self.document[name] = plain(value)
        self.save()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the changes made inside at once, in the end: with many rows every write takes a while."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
            self.save()

    def save(self) -> None:
        """Write the file, if there is one: on one line while the run goes on, which is much quicker."""
        self.document["updated"] = _now()
        if self.path is not None and not self._waiting:
            indent = None if self.document["status"] == "running" else 1
            write_atomically(self.path, json.dumps(self.document, indent=indent, allow_nan=False) + "\n")
