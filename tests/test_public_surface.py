"""The public surface is frozen: what `foveate` exports is written down, and changes on purpose only.

After adding or removing an export, change `public_surface.txt` in the same commit.
"""

import ast
import inspect
from pathlib import Path

import foveate

FROZEN = Path(__file__).with_name("public_surface.txt")


def exported() -> dict[str, str]:
    """Names that `__init__.py` re-exports (`from a import b as b`), and where from."""
    tree = ast.parse(Path(foveate.__file__).read_text())
    return {
        alias.asname: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
        if alias.asname is not None
    }


def test_the_surface_is_the_frozen_one():
    assert sorted(exported()) == FROZEN.read_text().split()


def test_every_import_of_the_package_is_an_explicit_re_export():
    tree = ast.parse(Path(foveate.__file__).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Import), f"line {node.lineno}: use `from a import b as b`"
        if isinstance(node, ast.ImportFrom) and node.module != "typing":
            for alias in node.names:
                assert alias.asname == alias.name, f"line {node.lineno}: write `{alias.name} as {alias.name}`"


def test_names_come_from_the_module_that_defines_them():
    for name, module in exported().items():
        value = getattr(foveate, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == module, name
            assert value.__name__ == name


def test_everything_public_says_what_it_is():
    for name in exported():
        value = getattr(foveate, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
