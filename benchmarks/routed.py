"""How do routed systems stand beside full attention, and from which length on? Ratios of one run.

    python benchmarks/routed.py [--threads 2] [--repeats 3] [--lengths 4096 16384] [--only KEY ...]

Every registered system of family `routed` at dim 256 and 4 heads, as its own `for_workload` makes it, beside full
attention in turn: on square grids where it takes two axes, else on sequences, causal where it must be. Whole
modules are timed, projections and the choice of pairs included. A ratio is full attention's median over the
system's; in brackets the 10th and 90th percentile of the ratios of neighbouring repeats. The crossover is the
length from which on the system is faster, interpolated between the lengths of a ladder. Errors are checked first,
at a small size: nothing is timed of a system that is wrong. A
system whose step takes longer than `--longest` seconds at a length is left out there, and named.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field

import torch

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import Facts, get_system, list_systems
from foveate.measure.fingerprint import fingerprint
from foveate.measure.gate import check_mechanism
from foveate.measure.subject import Subject
from foveate.measure.timer import Timing, time_interleaved

BASELINE = "full_attention"
# Lengths the crossover is looked for at; those of the table are added.
LADDER = (1024, 2048, 4096, 8192, 16384)
GATE = 256
PASSES = ("f", "fb")
SHAPES = ("causal", "grid", "sequence")


def grid_of(n: int, shape: str) -> Grid:
    """The grid of a length: as square as a power of two allows, or a sequence."""
    if shape != "grid":
        return Grid(n)
    side = 2 ** (int(math.log2(n)) // 2)
    return Grid(side, n // side)


def build(facts: Facts, n: int, shape: str, options) -> Subject:
    """Build a system for a length.

    Raises:
        ArgumentError, UnsupportedError: its own reason why it can't.
    """
    torch.manual_seed(0)
    # What is always causal is taken as published: some choose for blocks of queries, and are asked for less
    # than a strictly causal workload would ask for.
    causal = shape == "causal" and facts.causal == "optional"
    subject = Subject.build(
        facts, dim=options.dim, grid=grid_of(n, shape), heads=options.heads, causal=causal
    )
    subject.module.eval()
    return subject


def shape_of(facts: Facts, options) -> tuple[str | None, str]:
    """The shape a system is timed on, or why on none."""
    if not hasattr(facts.cls, "for_workload"):
        return None, "it is no self-attention over tokens that a workload could ask for"
    reason = "takes neither grids nor sequences"
    # What has a causal form was made for sequences that are read from left to right.
    for shape in SHAPES if facts.causal != "no" else SHAPES[1:]:
        if (2 if shape == "grid" else 1) not in facts.dims:
            continue
        try:
            build(facts, GATE, shape, options)
        except (ArgumentError, UnsupportedError) as error:
            reason = str(error)
        else:
            return shape, ""
    return None, reason


@dataclass
class Entry:
    """One system: its ratios by (length, pass), what is to be said, and the seconds of a step at the last length."""

    key: str
    shape: str
    ratios: dict[tuple[int, str], tuple[float, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    step: tuple[int, float] = (0, 0.0)

    def crossover(self, what: str) -> str:
        """From which length on it is faster than full attention."""
        line = sorted((n, ratio) for (n, which), (ratio, _) in self.ratios.items() if which == what)
        if not line:
            return "not timed"
        if line[-1][1] <= 1:
            return f"none up to {line[-1][0]}: slower than dense"
        slower = [i for i, (_, ratio) in enumerate(line) if ratio <= 1]
        if not slower:
            return f"below {line[0][0]}"
        (n, low), (more, high) = line[slower[-1]], line[slower[-1] + 1]
        share = math.log(1 / low) / math.log(high / low)
        return f"about {100 * round(n * (more / n) ** share / 100)}"

    def cell(self, n: int, what: str) -> str:
        """The ratio at one length in words."""
        if (n, what) not in self.ratios:
            return "not timed"
        ratio, spread = self.ratios[n, what]
        return f"{ratio:.2f}x {spread}" + ("  slower than dense" if ratio < 1 else "")


def ratio_of(base: Timing, other: Timing) -> tuple[float, str]:
    """Ratio of medians, and the 10th and 90th percentile of the ratios of neighbouring repeats."""
    each = sorted(a / b for a, b in zip(base.samples_ms, other.samples_ms, strict=False))
    low, high = (each[round(share * (len(each) - 1))] for share in (0.1, 0.9))
    return base.median_ms / other.median_ms, f"[{low:.2f}..{high:.2f}]"


def calls_of(subject: Subject) -> dict[str, object]:
    """Forward without autograd, and a forward with its backward."""
    x = subject.sample(1)

    def forward():
        with torch.no_grad():
            subject(x)

    return {"f": forward, "fb": lambda: subject.step(x)}


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_length(entries: list[Entry], n: int, shape: str, repeats: int, options) -> None:
    """Time everybody of one shape at one length, full attention in turn with them."""
    calls = {}
    for facts in map(get_system, [BASELINE, *(entry.key for entry in entries)]):
        entry = next((e for e in entries if e.key == facts.key), None)
        # No step grows less than its tokens: what must take too long is not even tried.
        seen, spent = entry.step if entry is not None else (0, 0.0)
        if entry is not None and seen and spent * n / seen > options.longest:
            entry.notes.append(f"N = {n}: a step takes {spent:.1f} s at {seen} already, left out")
            continue
        try:
            made = calls_of(build(facts, n, shape, options))
            spent = seconds_of(made["fb"])
        except (ArgumentError, UnsupportedError, RuntimeError) as error:
            if entry is None:
                raise
            entry.notes.append(f"N = {n}: {error}")
            continue
        if entry is not None:
            entry.step = (n, spent)
        if spent > options.longest and entry is not None:
            entry.notes.append(f"N = {n}: a step takes {spent:.0f} s, left out")
            continue
        calls |= {f"{facts.key} {what}": call for what, call in made.items()}
    # Everybody has run once by now. A machine too slow for the budget repeats less.
    left = options.budget - (time.perf_counter() - options.start)
    found = time_interleaved(
        calls, warmup=0, min_repeats=min(2, repeats), max_repeats=repeats, budget_s=max(left, 1.0)
    )
    times = found.times
    for entry in entries:
        for what in PASSES:
            name = f"{entry.key} {what}"
            if name in found.errors:
                entry.notes.append(f"N = {n}: {found.errors[name]}")
            if name in times:
                entry.ratios[n, what] = ratio_of(times[f"{BASELINE} {what}"], times[name])


def admitted(options) -> list[Entry]:
    """The systems that can be timed and pass the gate; says why of the others."""
    entries = []
    for facts in list_systems(family="routed"):
        if options.only and facts.key not in options.only:
            continue
        shape, reason = shape_of(facts, options)
        if shape is None:
            print(f"{facts.key}: left out; {reason}")
            continue
        gate = check_mechanism(
            lambda facts=facts, shape=shape: build(facts, GATE, shape, options),
            batch_coupled=facts.batch_coupled,
            causal=shape == "causal" and facts.causal == "optional",
        )
        if not gate.ok:
            print(f"{facts.key}: WRONG, nothing is timed; {gate.reason}")
            continue
        entries.append(Entry(facts.key, shape))
    return entries


def table(entries: list[Entry], lengths: list[int]) -> None:
    columns = [(n, what) for n in lengths for what in PASSES]
    head = [f"N {n} {'forward' if what == 'f' else 'forward+backward'}" for n, what in columns]
    print("\n| system | shape | " + " | ".join(head) + " | faster from, forward | faster from, f+b |")
    print("|---" * (len(columns) + 4) + "|")
    for entry in entries:
        cells = [entry.cell(n, what) for n, what in columns]
        print(f"| {entry.key} | {entry.shape} | " + " | ".join(cells)
              + f" | {entry.crossover('f')} | {entry.crossover('fb')} |")  # fmt: skip
    slower = [e.key for e in entries if any(r < 1 for (n, _), (r, _) in e.ratios.items() if n in lengths)]
    print(f"\nSlower than dense at a length of the table: {', '.join(slower) or 'none'}.")
    for entry in entries:
        for note in entry.notes:
            print(f"{entry.key}, {note}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384], help="powers of two")
    parser.add_argument("--ladder", type=int, nargs="*", default=list(LADDER), help="more, for the crossover")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds of one step; slower: left out")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no length is begun")
    parser.add_argument("--only", nargs="*", help="keys")
    options = parser.parse_args(arguments)
    if any(n & (n - 1) for n in (*options.lengths, *options.ladder)):
        parser.error("--lengths and --ladder take powers of two")
    torch.set_num_threads(options.threads)
    options.start = time.perf_counter()
    print(f"{fingerprint().sentence}; float32, batch 1, dim {options.dim}, {options.heads} heads")
    entries = admitted(options)
    if not entries:
        print("no system can be timed")
        return 1
    # The lengths of the table first; those that only serve the crossover as time allows, short ones first.
    extra = sorted(set(options.ladder) - set(options.lengths))
    for n in [*sorted(options.lengths), *extra]:
        if n in extra and time.perf_counter() - options.start > options.budget:
            print(f"N {n}: left out, the time is up")
            continue
        for shape in SHAPES:
            members = [entry for entry in entries if entry.shape == shape]
            if members:
                time_length(members, n, shape, options.repeats, options)
    table(entries, sorted(options.lengths))
    print(f"\n{time.perf_counter() - options.start:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
