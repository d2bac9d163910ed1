"""Runs the Python snippets of a Markdown file and writes down what they print.

All ```python blocks of a file run in order in one namespace. A ```text block that follows one directly (blank
lines between are fine) is what that block prints, down to the last character: `python -m docs.generate
snippets` rewrites it, and a test compares it.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.files import DOCS, ROOT

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where the text starts and stops in the file."""

    language: str
    text: str
    start: int
    stop: int
    line: int


def pages() -> list[Path]:
    """Return every Markdown page of the documentation, the README first."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    return [
        Block(m.group(1), m.group(2), m.start(2), m.end(2), page.count("\n", 0, m.start(2)))
        for m in _FENCE.finditer(page)
    ]


def shown_output(page: str, found: list[Block], index: int) -> Block | None:
    """Return the ```text block that stands directly after block `index`, if there is one."""
    if index + 1 == len(found) or found[index + 1].language != "text":
        return None
    between = page[found[index].stop : found[index + 1].start]
    return found[index + 1] if not between.replace("```text", "").replace("```", "").strip() else None


def run(page: str, name: str) -> Iterator[tuple[Block, Block | None, str]]:
    """Run the Python blocks of a page; yields the block, the output the page shows, and the real one."""
    found = blocks(page)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for index, block in enumerate(found):
        if block.language != "python":
            continue
        printed = io.StringIO()
        # Blank lines in front make tracebacks point to the line of the page.
        code = compile("\n" * block.line + block.text, name, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        yield block, shown_output(page, found, index), printed.getvalue()


def portable(output: str) -> str:
    """Return an output with what depends on the machine replaced: the C++ core's vector level and threads."""
    return re.sub(
        r"cpu \((?:AVX|portable|baseline)[^,)]*, \d+ threads?\)", "cpu (AVX-512, 2 threads)", output
    )


def refreshed(page: str, name: str) -> str:
    """Return the page with every shown output replaced by what its snippet prints now."""
    for _, shown, printed in reversed(list(run(page, name))):
        if shown is not None:
            page = page[: shown.start] + portable(printed).rstrip("\n") + "\n" + page[shown.stop :]
    return page
