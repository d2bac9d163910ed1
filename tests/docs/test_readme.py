"""The pages tell the truth: snippets run, commands and links exist, shown output is what is printed."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from docs.snippets import blocks, pages, portable, run
from foveate.cli.app import app
from foveate.kernels.cpu.library import absent

ROOT = Path(__file__).parents[2]
PAGES = pages()
SHELL = ("sh", "bash", "console", "shell")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands(program: str) -> list[str]:
    """Every line of a shell block that starts with `program`, without its comment."""
    found = []
    for path in PAGES:
        for block in blocks(text(path)):
            if block.language in SHELL:
                lines = (line.removeprefix("$ ").split("  #")[0].strip() for line in block.text.splitlines())
                found += [line for line in lines if line.split(" ")[0].split("/")[-1] == program]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("path", [p for p in PAGES if "```python" in text(p)], ids=name)
def test_snippets_run_and_print_what_the_page_shows(path):
    for block, shown, printed in run(text(path), name(path)):
        if shown is None:
            continue
        if absent() and re.search(r"^ *(backend +)?cpu ", shown.text, re.MULTILINE):
            # Without the C++ core the same line honestly prints another choice.
            assert "tiles" in printed
            continue
        assert shown.text.strip("\n") == portable(printed).strip("\n"), (
            f"{name(path)}:{block.line}: stale output"
        )


def test_the_readme_shows_an_explanation():
    explanations = [b for b in blocks(text(ROOT / "README.md")) if "pairs computed" in b.text]
    assert explanations
    assert explanations[0].language == "text"


@pytest.mark.parametrize("line", commands("foveate"))
def test_commands_exist_with_these_options(line):
    """Parses the line as the command would, without running it."""
    _, verb, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    command = group.get_command(None, verb)
    assert command is not None, f"no command {verb!r}"
    with command.make_context(verb, arguments):
        pass
    help_text = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert help_text.exit_code == 0


def test_the_readme_names_the_commands():
    assert {shlex.split(line)[1] for line in commands("foveate")} >= {
        "compare",
        "list",
        "show",
        "explain",
        "doctor",
    }


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line):
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    named = [word for word in line.split()[1:] if "=" not in word]
    assert named
    assert set(named) <= targets


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    page = re.sub(r"```.*?```|`[^`\n]*`", "", text(path), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'(?:src|srcset|href)="([^"]+)"', page)
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        if anchor in ("only-light", "only-dark"):
            anchor = ""
        file = path.parent / target if target else path
        assert file.exists(), f"{name(path)} links to {link}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text(file), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link
