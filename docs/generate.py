"""Writes everything in the documentation that is generated, or says what is stale.

    python -m docs.generate                    write all parts
    python -m docs.generate gallery readme     write these parts
    python -m docs.generate --check [PART...]  write nothing, name stale files, exit 1 if there are any

Parts: gallery (pictures of patterns), catalogue (page and exact pictures of systems), readme (its catalogue
table), snippets (what the snippets of all pages print), reach (pictures found by experiment), support (the
matrix: every system is run). docs/benchmarks.md is written by `python -m benchmarks`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs import catalogue, gallery, snippets, support
from docs.files import ROOT, with_region

Files = dict[Path, str]


def readme() -> Files:
    """Return the README with its generated region."""
    path = ROOT / "README.md"
    table = catalogue.families("docs/catalogue.md")
    return {path: with_region(path.read_text(encoding="utf-8"), "catalogue", table)}


def outputs() -> Files:
    """Return every page with what its snippets print."""
    found = {path: path.read_text(encoding="utf-8") for path in snippets.pages() if path.exists()}
    return {path: snippets.refreshed(text, path.name) for path, text in found.items() if "```python" in text}


PARTS: dict[str, Callable[[], Files]] = {
    "gallery": gallery.files,
    "catalogue": catalogue.files,
    "readme": readme,
    "snippets": outputs,
    "reach": catalogue.reach_pictures,
    "support": support.files,
}
# Parts that depend on integers and text alone, the same on every machine, and take no time to speak of.
CHEAP = ("gallery", "catalogue", "readme")


def stale(files: Files) -> list[Path]:
    """Return the files that are missing or differ."""
    return [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when something is stale")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    old = []
    for part in options.parts or PARTS:
        files = PARTS[part]()
        for path in stale(files):
            old.append(path)
            print(f"{'stale' if options.check else 'wrote'} {path.relative_to(ROOT)}  ({part})")
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(files[path], encoding="utf-8")
    if options.check and old:
        print("run `python -m docs.generate` and commit what it changes")
    return int(options.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
