"""Computes the headline figures of all systems, or of some, and writes docs/papers.md.

    python -m benchmarks.papers                  all of them
    python -m benchmarks.papers halonet volo     some; the other sections of the page stay as they are

Every figure is computed anew; nothing is read back from the page.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.__main__ import sections
from foveate.core.registry import get_system

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "papers.md"
HEAD = """<!-- Written by `python -m benchmarks.papers`. Do not edit. -->

# The papers' figures, checked

What each paper headlines and can be counted or measured without its GPU, its weights and its data: the paper's
number beside ours, and the setting of ours. Settings differ; the last column says how.
"""


def keys() -> list[str]:
    """Return the systems that have a file here."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def section(key: str) -> str:
    """Compute the figures of one system and return its section of the page."""
    rows = list(import_module(f"benchmarks.papers.{key}").figures())
    cells = [(f.claim, f.paper, f.ours, f.how) for f in rows]
    table = ["| figure | paper | here | setting |", "|---|---|---|---|"]
    table += ["| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in cells]
    body = "\n".join(table)
    return f"<!-- begin: {key} -->\n## {key}\n\n{get_system(key).paper}\n\n{body}\n<!-- end: {key} -->\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="systems; all by default")
    chosen = parser.parse_args(arguments).keys
    unknown = [key for key in chosen if key not in keys()]
    if unknown:
        parser.error(f"no figures for {', '.join(unknown)}; there are {', '.join(keys()) or 'none'}")
    kept = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for key in chosen or keys():
        kept[key] = section(key)
        print(kept[key], flush=True)
        PAGE.write_text("\n".join([HEAD, *(kept[k] for k in keys() if k in kept)]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
