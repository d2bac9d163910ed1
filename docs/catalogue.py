"""The catalogue of systems, from the facts and docstrings in the registry."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from docs.files import DOCS, IMAGES, NOTICE, table
from foveate.core.grid import Grid
from foveate.core.registry import Facts, get_system, list_systems
from foveate.measure.reach import reach_levels
from foveate.measure.subject import Subject
from foveate.patterns.pattern import Pattern

FIDELITY = {
    "vectors": "outputs and, mostly, gradients equal the authors' code, to float32 rounding",
    "code": "follows the authors' code, without vectors to compare with",
    "paper": "from the paper's text",
    "reconstruction": "the equations are partly ours; never recommended by `compare`",
}
INPUT = {
    "tokens": "tokens (B, N, C) and a Grid",
    "spatial": "maps (B, C, *spatial)",
    "cross": "queries (B, Q, C) and sources of its own; not for `compare`",
}
_GRIDS = (Grid(24, 24), Grid(24))


def systems() -> list[Facts]:
    """Return the systems of the package itself; what other packages register is documented there."""
    return [facts for facts in list_systems() if facts.cls.__module__.startswith("foveate.")]


def paper(facts: Facts) -> str:
    """Return the title, linked to arXiv."""
    link = f"[{facts.title}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else facts.title
    return f"{link}, {facts.year}"


def overview(page: str = "") -> str:
    """Return the table of all systems; `page` is where their sections are."""
    rows = [
        [f"[`{f.key}`]({page}#{f.key})", paper(f), f.family, f"{f.cost}", f.fidelity, f.causal]
        for f in systems()
    ]
    return table(["key", "paper", "family", "cost", "fidelity", "causal"], rows)


def families(page: str) -> str:
    """Return one row per family, with the keys of its systems: what fits on a first page."""
    members: dict[str, list[Facts]] = {}
    for facts in systems():
        members.setdefault(facts.family, []).append(facts)
    rows = [
        [family, str(len(found)), ", ".join(f"[`{f.key}`]({page}#{f.key})" for f in found)]
        for family, found in sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return table(["family", "", "systems"], rows)


def _prose(line: str) -> str:
    """Escape what Markdown would take for markup, outside of code."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", p) for p in parts)


def explanation(facts: Facts) -> str:
    """Return the module's docstring less its first paragraph, which names the paper."""
    _, _, rest = facts.doc.partition("\n\n")
    return "\n".join(line if line.startswith("    ") else _prose(line) for line in rest.splitlines())


def _facts(facts: Facts) -> str:
    rows = [
        ["family, role", f"{facts.family}, {facts.role}"],
        ["input", INPUT[facts.layout]],
        ["grids", f"{', '.join(map(str, facts.dims))} axes; sizes: {facts.sizes}"],
        ["cost", facts.cost],
        ["causal", facts.causal],
        ["computed by", facts.primitive],
        ["fidelity", f"{facts.fidelity}: {FIDELITY[facts.fidelity]}"],
    ]
    if facts.batch_coupled:
        rows.append(["batch", "the output of a sample depends on the others in its batch"])
    if facts.frozen_params:
        rows.append(["no gradient", ", ".join(f"`{name}`" for name in facts.frozen_params)])
    if facts.limits:
        rows.append(["limits", _prose(facts.limits)])
    return table(["fact", ""], rows)


def _options(facts: Facts) -> str:
    shown = []
    for name, parameter in inspect.signature(facts.cls).parameters.items():
        shown.append(name if parameter.default is parameter.empty else f"{name}={parameter.default!r}")
    return f'`create("{facts.key}", {", ".join(shown)})`'


def _built(facts: Facts, grid: Grid) -> Subject:
    torch.manual_seed(0)
    return Subject.build(facts, dim=32, grid=grid, heads=2, causal=facts.causal == "always")


def _grid(facts: Facts) -> Grid:
    return next(grid for grid in _GRIDS if grid.ndim in facts.dims)


def _middle(grid: Grid) -> int:
    return int(grid.ravel([torch.tensor(size // 2) for size in grid.sizes]))


@cache
def _pattern(key: str) -> Pattern | None:
    """Return the pattern of a system on its grid, None where it has none that could be laid out there."""
    facts = get_system(key)
    if not hasattr(facts.cls, "where"):
        return None
    grid = _grid(facts)
    module: Any = _built(facts, grid).module
    where = module.where(grid)
    laid_out = isinstance(where, Pattern) and getattr(where, "grid", None) == grid
    return where if laid_out else None  # type: ignore[return-value]


def has_pattern(facts: Facts) -> bool:
    """Whether the system can say by itself whom a token of a grid attends to."""
    return _pattern(facts.key) is not None


def has_picture(facts: Facts) -> bool:
    """Whether tokens of one grid attend to one another, so that there is something to draw."""
    return facts.layout != "cross"


def pattern_pictures() -> dict[Path, str]:
    """Return the exact pictures: the pattern that a system builds on a grid."""
    out = {}
    for facts in filter(has_picture, systems()):
        grid, where = _grid(facts), _pattern(facts.key)
        if where is None:
            continue
        out[IMAGES / "systems" / f"{facts.key}.svg"] = where.draw_svg(query=_middle(grid), size=168) + "\n"
    return out


def reach_pictures() -> dict[Path, str]:
    """Return the others' pictures, found by experiment on an untrained module; rounding may move a shade."""
    out = {}
    for facts in filter(has_picture, systems()):
        if not has_pattern(facts):
            grid = _grid(facts)
            levels = reach_levels(_built(facts, grid))
            out[IMAGES / "systems" / f"{facts.key}.svg"] = _shades(grid, levels, facts.key)
    return out


def _shades(grid: Grid, levels: list[int], key: str) -> str:
    rows, columns = (1, grid[0]) if grid.ndim == 1 else grid.sizes
    size = 168 / max(rows, columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {columns} {rows}" '
        f'width="{columns * size:g}" height="{rows * size:g}" shape-rendering="crispEdges">',
        f"<title>{key}: whom the middle token depends on</title>",
        f'<rect width="{columns}" height="{rows}" fill="#eef1f3"/>',
    ]
    for level in range(1, max(levels, default=0) + 1):
        cells = [divmod(i, columns) for i, found in enumerate(levels) if found == level]
        path = "".join(f"M{x} {y}h1v1h-1z" for y, x in cells)
        if path:
            parts.append(f'<path d="{path}" fill="#2f6f8f" fill-opacity="{level / 9:.2f}"/>')
    y, x = divmod(_middle(grid), columns)
    parts += [f'<path d="M{x} {y}h1v1h-1z" fill="#e4572e"/>', "</svg>\n"]
    return "".join(parts)


def _picture(facts: Facts) -> list[str]:
    grid = _grid(facts)
    size = "x".join(map(str, grid.sizes))
    if has_pattern(facts):
        caption = f"The keys of one token, orange, on a {size} grid, as `for_workload` builds the system."
    else:
        caption = (
            f"How strongly one token, orange, depends on each token of a {size} grid: gradients of an "
            "untrained module at a random input."
        )
    return [f"![{facts.key}](img/systems/{facts.key}.svg)", "", f"*{caption}*", ""]


def _section(facts: Facts) -> str:
    return "\n".join(
        [
            f"## {facts.key}",
            "",
            f"{paper(facts)}.",
            "",
            *(_picture(facts) if has_picture(facts) else []),
            explanation(facts),
            "",
            _options(facts),
            "",
            _facts(facts),
        ]
    )


def page() -> str:
    """Return docs/catalogue.md."""
    found = systems()
    count = sum(f.fidelity == "vectors" for f in found)
    head = (
        "# Catalogue\n\n"
        f"{len(found)} systems, {count} of them compared with their authors' code. "
        "`foveate.create(key, ...)` builds one, `foveate show KEY` prints its section in a terminal.\n\n"
        + "".join(
            f"- fidelity `{word}`: {FIDELITY[word]}.\n"
            for word in FIDELITY
            if any(f.fidelity == word for f in found)
        )
    )
    return (
        NOTICE.format("docs.generate") + head + "\n" + overview() + "\n" + "\n".join(map(_section, found))
    ).rstrip("\n") + "\n"


def files() -> dict[Path, str]:
    """Return the page and its exact pictures."""
    return {DOCS / "catalogue.md": page(), **pattern_pictures()}
