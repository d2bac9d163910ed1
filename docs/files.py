"""Where generated text goes: whole files, and marked regions inside pages written by hand."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
IMAGES = DOCS / "img"

# The first line of pages nobody should edit.
NOTICE = "<!-- Written by `python -m {}`. Do not edit. -->\n\n"


def with_region(page: str, name: str, text: str) -> str:
    """Replace what stands between `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        ValueError: if the page has no such region, or several.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    replaced, count = pattern.subn(lambda _: begin + text.strip("\n") + "\n" + end, page)
    if count != 1:
        raise ValueError(f"expected exactly one region {begin.strip()!r}, found {count}")
    return replaced


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )
