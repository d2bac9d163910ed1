"""Runs the benchmark scripts of this folder one after another and writes docs/benchmarks.md.

    python -m benchmarks                           all of them
    python -m benchmarks tiles                     some; the other sections of the page stay as they are
    python -m benchmarks --repeats 5 --note "..."  fewer repeats; a sentence for the page
    python -m benchmarks scan --lengths 4096       options of a script, when it is the only one

Every script prints its own device, dtype, threads and shapes, checks its results before it times anything,
and says nothing about speed when they are wrong: it then exits with 1, and so does this.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEAD = """<!-- Written by `python -m benchmarks`. Do not edit. -->

# Benchmarks

Ratios of one run each: both sides were timed in turn, in one process, after their results had been compared.
Figures hold for the machine, dtype and shapes printed with them and for nothing else; `make bench` measures
yours and rewrites this page.
"""


def scripts() -> dict[str, Path]:
    """Return name -> script, in alphabetical order."""
    return {path.stem: path for path in sorted(HERE.glob("*.py")) if not path.stem.startswith("_")}


def introduction(script: Path) -> str:
    """Return the docstring of a script less its first usage block: what is measured, in prose."""
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem
    return "\n\n".join(part for part in doc.split("\n\n") if not part.startswith("    "))


def run(script: Path, arguments: list[str]) -> tuple[int, str]:
    """Run a script, showing what it prints; returns its exit code and its output."""
    command = [sys.executable, "-u", str(script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, "\n".join(lines)


def section(name: str, script: Path, arguments: list[str], output: str, note: str) -> str:
    """Return the section of the page that belongs to one script."""
    command = shlex.join(["python", f"benchmarks/{script.name}", *arguments])
    note = f"\n{note}\n" if note else ""
    return (
        f"<!-- begin: {name} -->\n## {name}\n\n{introduction(script)}\n{note}\n"
        f"```sh\n{command}\n```\n\n```text\n{output}\n```\n<!-- end: {name} -->\n"
    )


def sections(page: str) -> dict[str, str]:
    """Return the sections a page has."""
    found = re.finditer(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->\n", page, re.DOTALL)
    return {match.group(1): match.group(0) for match in found}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scripts())}; all by default")
    parser.add_argument("--repeats", type=int, help="timed rounds; each script's own number by default")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--note", default="", help="a sentence for the page, about the machine for example")
    options, passed = parser.parse_known_args(arguments)
    if passed and len(options.names) != 1:
        parser.error(f"{' '.join(passed)}: name the one benchmark these options are for")
    for name in options.names:
        if name not in scripts():
            parser.error(f"no benchmark {name!r}; there are {', '.join(scripts())}")
    for option in ("repeats", "threads"):
        if getattr(options, option) is not None:
            passed += [f"--{option}", str(getattr(options, option))]
    kept = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    failed = []
    for name in options.names or scripts():
        print(f"== {name}", flush=True)
        code, output = run(scripts()[name], passed)
        if code:
            failed.append(name)
            continue
        kept[name] = section(name, scripts()[name], passed, output, options.note)
        # After every script, so that an interrupted run keeps what it has.
        PAGE.write_text("\n".join([HEAD, *(kept[n] for n in scripts() if n in kept)]), encoding="utf-8")
    for name in failed:
        print(f"{name} failed; its section of the page was left as it was", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
