"""One way only: every import goes down the list of rooms. Read from the syntax trees, nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
ROOT = SOURCE / "foveate"
# From the bottom up. Rooms on one line do not import one another.
LEVELS = (
    ("core",),
    ("patterns",),
    ("routing", "scores"),
    ("kernels",),
    ("control", "mechanisms"),
    ("adapters", "models", "learn", "study", "parallel"),
    ("measure", "cost", "tasks"),
    ("advise",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PLAIN = LEVEL["mechanisms"]  # up to here: torch, jaxtyping and the standard library only
PLAIN_MODULES = {"torch", "jaxtyping", *sys.stdlib_module_names}
VERSION = "foveate.__version__"  # the one thing the package itself defines
# Imported when it is used, never before: pictures of patterns and of scores.
LAZY = {("patterns", "matplotlib"), ("scores", "matplotlib")}
# Implementations of one contract, which never import one another.
SIBLINGS = {
    "kernels": {"reference", "sdpa", "tiles", "cpu", "flex", "triton"},
    "kernels.scan": {"reference", "chunk", "recurrent", "triton"},
    "kernels.sample": {"reference", "bag", "grid"},
}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> list[tuple[str, int]]:
    """Every module an `import` statement names, at any depth; `from a import b` also names `a.b`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module
            found.append((node.module, node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def member(name: str, package: str) -> str:
    """The part of a dotted name right below `foveate.<package>`, or ""."""
    start = f"foveate.{package}."
    return name.removeprefix(start).split(".")[0] if name.startswith(start) else ""


def violations(name: str, source: str) -> list[str]:
    """What a module of ours imports against the rules."""
    here = name.split(".")
    if len(here) == 1 or here[1] not in LEVEL:
        return []  # the package itself and its `__main__`, above all rooms
    room, found = here[1], []
    for target, line in imports(source):
        there = target.split(".")
        if there[0] == "foveate":
            if len(there) > 1 and there[1] in LEVEL and there[1] != room and LEVEL[there[1]] >= LEVEL[room]:
                found.append(f"{name}:{line} imports {target}, which is above or beside {room}")
            if len(there) == 1 and "foveate.__version__" not in [
                t for t, at in imports(source) if at == line
            ]:
                found.append(f"{name}:{line} imports the package instead of the defining module")
            found += [
                f"{name}:{line} imports its sibling {target}"
                for package, names in SIBLINGS.items()
                if (mine := member(name, package)) in names
                and (theirs := member(target, package)) in names
                and mine != theirs
            ]
        elif LEVEL[room] <= PLAIN and there[0] not in PLAIN_MODULES and (room, there[0]) not in LAZY:
            found.append(f"{name}:{line} imports {target}")
    return found


def test_every_room_has_a_level():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert rooms <= set(LEVEL), "give the new room a place in LEVELS"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("foveate.patterns.axis", "from foveate.kernels.attend import attend"),
        ("foveate.scores.bias", "import foveate.routing.topk"),
        ("foveate.scores.bias", "def f():\n    from foveate.models import backbone"),
        ("foveate.kernels.tiles", "from foveate.kernels import reference"),
        ("foveate.kernels.tiles.run", "from foveate.kernels.reference import run"),
        ("foveate.kernels.scan.chunk", "from foveate.kernels.scan.recurrent import step"),
        ("foveate.mechanisms.local.swin", "import numpy"),
        ("foveate.mechanisms.local.swin", "from einops import rearrange"),
        ("foveate.measure.timer", "from foveate.tasks.train import run"),
        ("foveate.core.grid", "from foveate import Grid"),
    ],
)
def test_the_rules_catch(name, source):
    assert violations(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("foveate.kernels.attend", "from foveate.kernels import reference\nimport torch.nn"),
        ("foveate.models.backbone", "from foveate.mechanisms.layout import as_tokens\nimport numpy"),
        ("foveate.kernels.scan.chunk", "from foveate.kernels.scan.contract import check\nimport math"),
        ("foveate", "from foveate.cli.app import main"),
    ],
)
def test_the_rules_allow(name, source):
    assert violations(name, source) == []
