"""`compare`: workload in, ranked and explained choice out, with the evidence.

For each workload: admit the mechanisms (build, causality, correctness gate), measure them, write each
finished row at once. Then recommend. An interruption keeps everything finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.advise.admit import Admission, Examiner, Site, admit, one_line
from foveate.advise.events import Event, Listener, nobody
from foveate.advise.recommend import recommend
from foveate.advise.settings import BASELINE, DEFAULT_WORKLOADS, Settings, Shape
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.measure.fingerprint import fingerprint
from foveate.measure.store import FILE_NAME, Store, StoreError
from foveate.measure.threads import threads as thread_count
from foveate.tasks.workload import make_workload

# Share of the whole budget that `shapes` gets beside other workloads; alone it gets all.
SHAPES_SHARE = 0.35
REPORT_NAME = "report.html"


@dataclass
class Comparison:
    """What `compare` found; the same content as results.json.

    Attributes:
        document: the parsed results.json (see docs/results-schema.md).
        out: the folder everything was written to, or None.
    """

    document: dict[str, Any]
    out: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per workload and mechanism."""
        return self.document["rows"]

    @property
    def status(self) -> str:
        """ "complete", or "interrupted" after Ctrl-C."""
        return self.document["status"]

    @property
    def recommendations(self) -> list[dict[str, Any]]:
        """Ranked choices with reasons, the headline first; one per workload that has measured rows."""
        return self.document["recommendations"]

    @property
    def best(self) -> str | None:
        """The recommended mechanism's key, or None when nothing was measured."""
        return self.recommendations[0]["mechanism"] if self.recommendations else None

    @property
    def errors(self) -> dict[str, str]:
        """Workloads that stopped as a whole, and why."""
        return {k: w["error"] for k, w in self.document["workloads"].items() if w.get("error")}

    def table(self, workload: str | None = None) -> str:
        """The figures as plain text, of one workload or of all."""
        from foveate.advise.table import plain_table

        return plain_table(self.document, workload)

    def to_html(self, path: str | Path) -> Path:
        """Write the self-contained offline report.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        from foveate.advise.report import write_report

        return write_report(self.document, Path(path))


def compare(
    workloads: Sequence[str] = DEFAULT_WORKLOADS,
    *,
    budget_s: float | None = None,
    mechanisms: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    shape: Shape | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    listener: Listener = nobody,
) -> Comparison:
    """Find the attention mechanism that suits a workload on this machine.

    Args:
        workloads: of "image", "restore", "text", "recall" (trained, scored) and "shapes" (timed at `shape`).
        budget_s: seconds for everything; None for 4.5 minutes, and more where more than 16 mechanisms share
            them (`settings.default_budget`).
        mechanisms: who takes part: keys, families such as "local", wildcards; every registered one when None.
            Full attention always does.
        device, dtype, threads: where and how.
        shape: the sizes `shapes` times.
        data: a folder of images (image, restore) or a text file (text) instead of the bundled data.
        seed: of data, parameters and inputs.
        out: folder for results.json and report.html; nothing is written when None.
        resume: go on with the run found in `out`.
        listener: told what happens, see `advise.events`.

    Returns:
        A `Comparison`. After Ctrl-C its status is "interrupted" and it holds what was finished.

    Raises:
        ArgumentError, UnknownNameError: an argument that cannot work.
        StoreError: `resume` without a run that fits these arguments.
    """
    settings = Settings(
        workloads=tuple(dict.fromkeys(workloads)),
        mechanisms=None if mechanisms is None else tuple(dict.fromkeys(mechanisms)),
        budget_s=None if budget_s is None else float(budget_s),
        device=device,
        dtype=dtype,
        threads=threads,
        shape=shape if shape is not None else Shape(),
        data=None if data is None else str(data),
        seed=seed,
    )
    folder = None if out is None else Path(out)
    with thread_count(threads):
        store = _open_store(folder, settings, resume)
        run = _Run(settings, store, folder, listener, resume)
        try:
            run.all()
            status = "complete"
        except KeyboardInterrupt:
            listener(Event("note", message="interrupted; keeping what is finished"))
            status = "interrupted"
        store.document["recommendations"] = recommend(store.document)
        store.update(status=status)
    return Comparison(store.document, folder)


def _open_store(folder: Path | None, settings: Settings, resume: bool) -> Store:
    machine = fingerprint(settings.device).as_dict()
    path = None if folder is None else folder / FILE_NAME
    if not resume:
        store = Store(path, fingerprint=machine, settings=settings.as_dict())
        store.save()
        return store
    if path is None:
        raise StoreError("resume needs the folder of the run to go on with: give out (--out).")
    store = Store.load(path)
    conflict = settings.conflict(store.document["settings"])
    for name in ("cpu", "gpu", "threads", "torch", "foveate"):
        was, now = store.document["fingerprint"].get(name), machine[name]
        if not conflict and was != now:
            conflict = f"it was made with {name} {was!r}, now it is {now!r}"
    if conflict:
        raise StoreError(f"cannot go on with {path}: {conflict}. Leave out --resume or choose another --out.")
    store.update(status="running", settings=settings.as_dict())
    return store


class _Run:
    """One comparison under way."""

    def __init__(
        self, settings: Settings, store: Store, folder: Path | None, listener: Listener, resume: bool
    ):
        self.settings, self.store, self.folder, self.resume = settings, store, folder, resume
        self.emit = listener
        self.systems = settings.systems()
        baseline = next((f for f in self.systems if f.key == BASELINE), None)
        self.examiner = Examiner(baseline, settings.seed)
        self.begin = time.perf_counter()

    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self.settings.seconds - (time.perf_counter() - self.begin)

    def put(self, row: dict[str, Any]) -> None:
        """Keep a row and tell about it."""
        self.store.put(row)
        self.emit(Event("row", row["workload"], row=row))

    def all(self) -> None:
        """Run every workload: `shapes` first, whose end is less sure, then races in what is left."""
        order = sorted(self.settings.workloads, key=lambda key: key != "shapes")
        for i, key in enumerate(order):
            learning = len(order) - i
            if key == "shapes":
                budget = self.left() * (1.0 if learning == 1 else SHAPES_SHARE)
            else:
                budget = self.left() / learning
            self.emit(Event("begin", key, message=key))
            try:
                self.shapes(budget) if key == "shapes" else self.learn(key, budget)
            except Exception as error:  # the other workloads' results are not this one's to lose
                self.describe(key, error=one_line(error))
                self.emit(Event("note", key, message=f"{key} stopped: {one_line(error)}"))
            self.emit(Event("end", key, 1.0))

    def admitted(self, workload: str, site: Site) -> list[Admission]:
        """Admit every system to a workload; rows of the others are kept at once."""
        kept = []
        for i, facts in enumerate(self.systems):
            share = 0.03 * i / len(self.systems)
            self.emit(Event("progress", workload, share, f"checking {facts.key}"))
            found = admit(workload, facts, site, examiner=self.examiner)
            if found.row is not None:
                self.put(found.row)
            else:
                kept.append(found)
        return kept

    def describe(self, workload: str, **fields: Any) -> None:
        """Keep a workload's own record."""
        records = dict(self.store.document["workloads"])
        records[workload] = {**records.get(workload, {}), **fields}
        self.store.update(workloads=records)

    def shapes(self, budget_s: float) -> None:
        """Time mechanisms at the user's sizes."""
        from foveate.advise.shapes import WORKLOAD, sweep

        shape = self.settings.shape
        wanted = {facts.key for facts in self.systems}
        if self._finished(WORKLOAD, wanted):
            return
        begin = time.perf_counter()
        site = self.site(Grid(*shape.grid), shape.dim, shape.heads)
        ladder = shape.ladder()
        self.describe(
            WORKLOAD,
            title=f"speed, memory and scaling at your sizes: {shape.heads} heads of {shape.head_dim}",
            metric="",
            grid=list(shape.grid),
            dim=shape.dim,
            heads=shape.heads,
            batch=shape.batch,
            causal=False,
            complete=False,
        )
        admissions = self.admitted(WORKLOAD, site)
        done = sweep(
            admissions,
            site,
            ladder,
            batch=shape.batch,
            # Checks serve the races as well: a slow machine must not pay for them with its sizes.
            budget_s=max(budget_s - (time.perf_counter() - begin), 0.6 * budget_s),
            put=self.put,
            emit=self.emit,
            seed=self.settings.seed,
        )
        measured = list(done[-1].sizes) if done else None
        self.describe(WORKLOAD, measured_grid=measured, complete=True, mechanisms=sorted(wanted))

    def site(self, grid: Grid, dim: int, heads: int, causal: bool = False) -> Site:
        """What a workload asks of mechanisms, on this run's device and dtype."""
        return Site(
            dim=dim,
            heads=heads,
            grid=grid,
            causal=causal,
            device=self.settings.device,
            dtype=self.settings.torch_dtype,
        )

    def learn(self, key: str, budget_s: float) -> None:
        """Race mechanisms on a workload with learning, then time their networks."""
        from foveate.advise.learned import (
            TIMING_SHARE,
            describe_race,
            rows_of,
            run_race,
            time_networks,
        )
        from foveate.advise.records import RaceResult

        wanted = {facts.key for facts in self.systems}
        if self._finished(key, wanted):
            return
        begin = time.perf_counter()
        workload = make_workload(key, **self.settings.workload_options(key))
        spec = workload.spec
        admissions = self.admitted(key, self.site(spec.grid, spec.dim, spec.heads, spec.causal))
        if not admissions:
            self.emit(Event("note", key, message="no mechanism can take part"))
            return

        def save(result: RaceResult) -> None:
            with self.store.together():
                self.store.document["races"][key] = result.to_dict()
                self.describe(key, **describe_race(workload, result) | {"complete": False})
                for row in rows_of(key, result, admissions):
                    if row["quality"] is not None or row["status"] != "measured":
                        self.store.put(row)

        stored = self.store.document["races"].get(key) if self.resume else None
        checkpoints = None if self.folder is None else self.folder / ".checkpoints" / key
        resumed = RaceResult.from_dict(stored) if stored else None
        left = (budget_s - (time.perf_counter() - begin)) * (1 - TIMING_SHARE)
        if left <= 0:
            hint = "Give a larger budget, fewer workloads or fewer mechanisms."
            raise bad("budget", self.settings.seconds, f"seconds that last until {key} can begin", hint)
        result = run_race(
            workload,
            admissions,
            self.settings,
            # The race counts the seconds of its earlier part as spent.
            budget_s=left + (resumed.spent_s if resumed else 0.0),
            emit=self.emit,
            save=save,
            resume=resumed,
            checkpoints=checkpoints,
        )
        if not result.complete:
            raise KeyboardInterrupt
        rows = rows_of(key, result, admissions)
        spent = time.perf_counter() - begin
        time_networks(
            workload, rows, self.settings, budget_s=max(budget_s - spent, 1.0) * 0.7, emit=self.emit
        )
        with self.store.together():
            for row in rows:
                self.put(row)
            self.describe(key, complete=True, mechanisms=sorted(wanted))
        if checkpoints is not None:
            shutil.rmtree(checkpoints.parent, ignore_errors=True)

    def _finished(self, workload: str, wanted: set[str]) -> bool:
        """Whether a resumed run has this workload complete for these mechanisms."""
        record = self.store.document["workloads"].get(workload, {})
        return self.resume and record.get("complete") is True and wanted <= set(record.get("mechanisms", []))
