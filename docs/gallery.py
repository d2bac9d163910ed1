"""Pictures of patterns. Every caption is the expression that was evaluated to draw its picture."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

import foveate
from docs.files import IMAGES
from foveate.patterns.pattern import Pattern

SIDE = 24
GRID = foveate.Grid(SIDE, SIDE)
# Names captions may use besides foveate's own.
NAMES = {
    "g": GRID,
    "ids": torch.tensor([0] * 14 + [1] * 9 + [2] * 19 + [-1] * 6)[None],
    "blocks": [(i, j) for i in range(6) for j in (i, (5 * i + 2) % 6, (2 * i + 3) % 6)],
}
LENGTH = 48
SETTING = (
    f"g = Grid({SIDE}, {SIDE}): the tokens that one query, orange, attends to on a grid.  "
    f"Squares with caption 'mask': {LENGTH} queries downwards, {LENGTH} keys to the right."
)


@dataclass(frozen=True)
class Tile:
    """One picture: file name, title, expression, and which token's keys are shown (None: the mask)."""

    name: str
    title: str
    code: str
    query: tuple[int, int] | None = None

    @property
    def pattern(self) -> Pattern:
        """What the expression makes; a Selection is drawn by its mask."""
        made = eval(self.code, {**vars(foveate), **NAMES})
        return made if isinstance(made, Pattern) else foveate.Explicit(made.dense()[0, 0])

    def svg(self, size: int) -> str:
        """Return the picture drawn by the library."""
        pattern = self.pattern
        length = pattern.tokens or LENGTH
        query = None if self.query is None else self.query[0] * SIDE + self.query[1]
        picture = pattern.draw_svg(length, query=query, size=size)
        # Fine lines in the colour of the page part the tokens.
        across = SIDE if self.query else length
        lines = "".join(f"M{i} 0V{across}M0 {i}H{across}" for i in range(1, across))
        return picture.replace(
            "</svg>", f'<path d="{lines}" fill="none" stroke="#ffffff" stroke-width=".07"/></svg>'
        )


TILES = (
    Tile("neighborhood", "neighborhood", "Neighborhood(g, 9)", (9, 13)),
    Tile("neighborhood_dilated", "dilated", "Neighborhood(g, 7, dilation=3)", (11, 12)),
    Tile("neighborhood_strided", "strided", "Neighborhood(g, 12, stride=4)", (9, 13)),
    Tile("neighborhood_causal", "causal on both axes", "Neighborhood(g, 9, causal=True)", (15, 14)),
    Tile("windows", "shifted windows", "Windows(g, 8, shift=4)", (9, 13)),
    Tile("halo", "blocks with a halo", "Halo(g, 6, 3)", (9, 13)),
    Tile("lattice", "dilated global lattice", "Lattice(g, 6)", (9, 13)),
    Tile("union", "near and far", "Neighborhood(g, 7) | Lattice(g, 6)", (9, 13)),
    Tile("sinks", "window and sinks (mask)", "SlidingWindow(11) | Sinks(3)"),
    Tile("specials", "class tokens (mask)", "with_specials(Neighborhood(44, 9), 4)"),
    Tile("blocks", "list of blocks (mask)", "BlockList(8, blocks)"),
    Tile("segments", "packed sequences (mask)", "Segments(ids) & Causal()"),
)

_COLUMNS, _SIZE, _GAP, _TEXT, _MARGIN = 4, 208, 26, 48, 4
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
# The colours of `draw_svg`, and what they become: it draws for a light page.
_THEMES = {
    "gallery.svg": {"title": "#1f2933", "code": "#52606d"},
    "gallery-dark.svg": {
        "title": "#e6edf3",
        "code": "#9aa7b4",
        "#2f6f8f": "#5fb3d4",
        "#eef1f3": "#1b2430",
        "#e4572e": "#ff7a4d",
        "#c9d1d6": "#36424f",
        "#ffffff": "#0d1117",
    },
}


def gallery(theme: dict[str, str]) -> str:
    """Return all tiles as one SVG with captions, on a transparent ground."""
    rows = -(-len(TILES) // _COLUMNS)
    width = 2 * _MARGIN + _COLUMNS * _SIZE + (_COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + rows * (_SIZE + _TEXT) + (rows - 1) * _GAP // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(SETTING, quote=False)}</title>",
    ]
    for index, tile in enumerate(TILES):
        row, column = divmod(index, _COLUMNS)
        x = _MARGIN + column * (_SIZE + _GAP)
        y = _MARGIN + row * (_SIZE + _TEXT + _GAP // 2)
        picture = tile.svg(_SIZE)
        for old, new in theme.items():
            picture = picture.replace(f'"{old}"', f'"{new}"')
        parts.append(picture.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
        for dy, size, colour, weight, font, text in (
            (19, 13.5, theme["title"], 600, "system-ui,-apple-system,'Segoe UI',sans-serif", tile.title),
            (37, min(11, _SIZE / (0.605 * len(tile.code))), theme["code"], 400, _FONT, tile.code),
        ):
            parts.append(
                f'<text x="{x}" y="{y + _SIZE + dy}" font-family="{font}" font-size="{size:.3g}" '
                f'font-weight="{weight}" fill="{colour}">{escape(text, quote=False)}</text>'
            )
    parts.append("</svg>\n")
    return "\n".join(parts)


def files() -> dict[Path, str]:
    """Return the gallery in two themes and every tile by itself."""
    out = {IMAGES / name: gallery(theme) for name, theme in _THEMES.items()}
    return out | {IMAGES / f"{tile.name}.svg": tile.svg(168) + "\n" for tile in TILES}
