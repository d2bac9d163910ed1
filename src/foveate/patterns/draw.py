"""Pictures of patterns: with matplotlib (`draw`), or as an SVG string without any dependency (`draw_svg`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import bad, need_extra
from foveate.core.grid import Grid
from foveate.patterns.compose import And, Not, Or
from foveate.patterns.pattern import Pattern
from foveate.patterns.specials import Specials

# Masks are shown by at most this many rows and columns, evenly spaced ones when there are more.
_LIMIT = 96
_INK, _PAPER, _QUERY, _LINE = "#2f6f8f", "#eef1f3", "#e4572e", "#c9d1d6"


def draw(pattern: Pattern, n_q: int | None = None, *, ax: Any = None, query: int | None = None, n_k=None):
    """Draw a pattern with matplotlib.

    Without `query` the mask: queries downwards, keys to the right (evenly spaced tokens when there are many).
    With `query` the keys of that token: on its grid if the pattern has one (the planes of a 3-d grid side by
    side), else as a strip.

    Args:
        pattern: what to draw.
        n_q: number of queries; may be left out when the pattern has a grid.
        ax: matplotlib axes to draw on; new ones when left out.
        query: a token id.
        n_k: number of keys, `n_q` by default.

    Returns:
        The matplotlib axes.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ArgumentError: if the lengths or the query do not fit.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
    except ImportError:
        raise need_extra("matplotlib", "compare") from None
    picture = _picture(pattern, n_q, n_k, query)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(4, 4))
    ax.imshow(
        picture.tolist(), cmap=ListedColormap([_PAPER, _INK, _QUERY]), vmin=0, vmax=2, interpolation="nearest"
    )
    ax.set_title(repr(pattern) if len(repr(pattern)) < 60 else type(pattern).__name__, fontsize=8)
    if query is None:
        ax.set_xlabel("keys")
        ax.set_ylabel("queries")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def draw_svg(
    pattern: Pattern, n_q: int | None = None, *, query: int | None = None, n_k=None, size: int = 120
) -> str:
    """Return the same picture as `draw` as an SVG element, `size` pixels on its longer side.

    Args:
        pattern: what to draw.
        n_q: number of queries; may be left out when the pattern has a grid.
        query: a token id; the mask is drawn without it.
        n_k: number of keys, `n_q` by default.
        size: pixels of the longer side.

    Raises:
        ArgumentError: if the lengths or the query do not fit.
    """
    picture = _picture(pattern, n_q, n_k, query)
    rows, columns = picture.shape
    unit = size / max(rows, columns, 1)
    title = repr(pattern).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    extent = f'width="{columns}" height="{rows}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {columns} {rows}" '
        f'width="{columns * unit:g}" height="{rows * unit:g}" shape-rendering="crispEdges">',
        f"<title>{title}</title>",
        f'<rect {extent} fill="{_PAPER}"/>',
    ]
    for value, colour in ((1, _INK), (2, _QUERY)):
        path = "".join(f"M{x} {y}h{width}v1h-{width}z" for y, x, width in _runs(picture == value))
        if path:
            out.append(f'<path d="{path}" fill="{colour}"/>')
    out.append(f'<rect {extent} fill="none" stroke="{_LINE}" vector-effect="non-scaling-stroke"/>')
    out.append("</svg>")
    return "".join(out)


def _picture(pattern: Pattern, n_q: int | None, n_k: int | None, query: int | None) -> Tensor:
    """Return (rows, columns) int: 0 masked, 1 may attend, 2 the query itself."""
    n_q, n_k = pattern.lengths(n_q, n_k)
    if query is not None:
        return _query_picture(pattern, n_q, n_k, query)
    q, k = _spaced(n_q), _spaced(n_k)
    return pattern.allowed(q[:, None], k[None], n_q, n_k).expand(len(q), len(k)).long()


def _query_picture(pattern: Pattern, n_q: int, n_k: int, query: int) -> Tensor:
    if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < n_q:
        raise bad("query", query, f"a token id from 0 to {n_q - 1}")
    seen = pattern.allowed(torch.tensor(query), torch.arange(n_k), n_q, n_k).expand(n_k).long()
    if n_q == n_k:
        seen[query] = 2
    grid = _grid_of(pattern)
    if grid is None or grid.numel != n_k or grid.ndim == 1:
        return seen[None]
    if grid.ndim == 2:
        return seen.view(*grid.sizes)
    # The planes of a 3-d grid stand side by side, one empty column between them.
    planes = torch.nn.functional.pad(seen.view(*grid.sizes), (0, 1))
    return planes.transpose(0, 1).reshape(grid[1], -1)[:, :-1]


def _grid_of(pattern: Pattern) -> Grid | None:
    if isinstance(pattern, And | Or):
        return next((grid for part in pattern.parts if (grid := _grid_of(part)) is not None), None)
    if isinstance(pattern, Not):
        return _grid_of(pattern.part)
    return None if isinstance(pattern, Specials) else getattr(pattern, "grid", None)


def _spaced(n: int) -> Tensor:
    return torch.arange(n) if n <= _LIMIT else torch.arange(_LIMIT) * n // _LIMIT


def _runs(on: Tensor) -> list[tuple[int, int, int]]:
    """Return (row, first column, width) of each horizontal run of True: far fewer shapes than cells."""
    edges = torch.nn.functional.pad(on.long(), (1, 1)).diff(dim=1)
    first, stop = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [(y, x, end - x) for (y, x), (_, end) in zip(first.tolist(), stop.tolist(), strict=True)]
