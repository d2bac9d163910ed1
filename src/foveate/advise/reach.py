"""The picture of whom a mechanism's middle token listens to, as measured, in plain SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.advise.svg import figure, text, words


def reach_picture(reach: Mapping[str, Any] | None, *, label: str, px: float = 96.0) -> str:
    """Draw the levels of `measure.reach` as a small square (or a band for sequences).

    Args:
        reach: {"grid": sizes, "levels": one 0-9 per token}; of a 3-d grid the middle slice is drawn.
        label: what the picture shows.
        px: side of the picture.
    """
    if not reach:
        body = [f'<rect width="{px}" height="{px}" rx="8" class="cell-none"/>']
        return figure(px, px, [*body, text(px / 2, px / 2 + 4, "no picture", anchor="middle")], label=label)
    sizes, levels = list(reach["grid"]), list(reach["levels"])
    while len(sizes) > 2:
        area = len(levels) // sizes[0]
        middle = sizes[0] // 2
        levels, sizes = levels[middle * area : (middle + 1) * area], sizes[1:]
    if len(sizes) == 1:
        sizes = [1, sizes[0]]
    rows, cols = sizes
    side = px / max(rows, cols)
    high = side * rows if rows > 1 else px / 4
    top = (px - high) / 2
    tall = high / rows
    body = [f'<rect y="{top:.2f}" width="{px}" height="{high:.2f}" rx="3" class="cell-none"/>']
    for r in range(rows):
        c = 0
        while c < cols:
            level = levels[r * cols + c]
            run = 1
            while c + run < cols and levels[r * cols + c + run] == level:
                run += 1
            if level:
                body.append(
                    f'<rect x="{c * side:.2f}" y="{top + r * tall:.2f}" width="{run * side + 0.15:.2f}" '
                    f'height="{tall + 0.15:.2f}" class="cell" opacity="{0.12 + 0.88 * level / 9:.2f}"/>'
                )
            c += run
    r, c = rows // 2, cols // 2
    body.append(
        f'<rect x="{c * side:.2f}" y="{top + r * tall:.2f}" width="{side:.2f}" height="{tall:.2f}" '
        'class="cell-me"/>'
    )
    return figure(px, px, body, label=label)


def reach_file(reach: Mapping[str, Any], key: str) -> str:
    """The picture of `reach_picture` as a file of its own, which brings its colours along."""
    picture = reach_picture(reach, label=f"whom the middle token of {words(key)} listens to", px=240.0)
    colours = ".cell-none{fill:#8883}.cell{fill:#2563b8}.cell-me{fill:none;stroke:#d4450c;stroke-width:1.6}"
    return picture.replace("</title>", f"</title>\n<style>{colours}</style>", 1) + "\n"
