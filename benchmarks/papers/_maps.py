"""Real attention maps for the papers' figures: what routers capture of the MiniLM encoder's attention."""

from collections.abc import Sequence
from functools import cache

from foveate.study.encoder import Encoder, documentation, minilm_folder
from foveate.study.recall import recall
from foveate.study.records import Recall

HOW = "q, k of the MiniLM sentence encoder, 6 layers of 12 heads, 512 tokens of Python's documentation"


@cache
def captured(only: tuple[str, ...], budgets: tuple[float, ...]) -> Recall | None:
    """Measure families of candidates, means over layers and heads; None where MiniLM is not installed."""
    if minilm_folder() is None:
        return None
    maps = Encoder().maps(documentation(1), tokens=512)
    return recall(maps, only=only, budgets=budgets, queries=256).mean()


def line(found: Recall, names: Sequence[str]) -> str:
    """Write the mass of families, and of the best pairs, at the cheapest budget of the study."""
    cells = []
    for name in names:
        row = min((row for row in found.rows if row.family == name), key=lambda row: row.computed)
        cells.append(f"{name} {row.mass:.0%} (best {row.oracle:.0%}) at {row.pairs:.1%} of the pairs")
    return ", ".join(cells)
