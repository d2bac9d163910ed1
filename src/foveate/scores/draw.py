"""Pictures of positions terms: what a score adds, an after-value multiplies or a rotation makes of equal vectors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad, need_extra
from foveate.scores.after import Multiply
from foveate.scores.base import Extent, Score
from foveate.scores.pairs import Pairs
from foveate.scores.rotations import Rotation

Drawable = Score | Multiply | Rotation
_LIMIT = 96
_LOW, _ZERO, _HIGH = (47, 111, 143), (238, 241, 243), (228, 87, 46)


def score_map(
    part: Drawable, n_q: int, *, n_k: int | None = None, head: int = 0, heads: int = 1, batch: int = 0
) -> Float[Tensor, "n_q n_k"]:
    """Return what a part does to logits of 0 (a `Multiply`: to weights of 1), as a map over pairs.

    A rotation shows cos of the angles between queries and keys, averaged over the channel pairs it turns: the
    product of a vector of ones with itself, turned to both positions.

    Args:
        part: what to look at.
        n_q: number of queries.
        n_k: number of keys, `n_q` by default.
        head: which head.
        heads: number of query heads, when the part has one value for all or is to be checked for them.
        batch: which sample.

    Raises:
        ArgumentError: naming `part`, or what does not fit.
    """
    n_k = n_q if n_k is None else n_k
    with torch.no_grad():
        if isinstance(part, Rotation):
            return _turned(part, n_q, n_k)
        if not isinstance(part, Score | Multiply):
            raise bad("part", part, "a Score, a Multiply or a Rotation")
        sizes = [t.shape for t in part.tensors().values() if t.ndim >= 4]
        batches = max([batch + 1, *(s[0] for s in sizes)])
        part.check(Extent(batches, heads, n_q, n_k))
        at = Pairs.full(n_q, n_k)
        start = torch.ones if isinstance(part, Multiply) else torch.zeros
        found = part.apply(start(batches, heads, n_q, n_k), at)
    return found.expand(batches, heads, n_q, n_k)[batch, head]


def _turned(part: Rotation, n_q: int, n_k: int) -> Tensor:
    grid, sections = getattr(part, "grid", None), getattr(part, "sections", None)
    axes = 1 if grid is None else grid.ndim
    d = 2 * sum(sections) if sections is not None else getattr(part, "dims", None) or 16 * axes
    ones, n = torch.ones(1, max(n_q, n_k), d), max(n_q, n_k)
    positions = None if sections is None else torch.arange(n)[:, None].expand(-1, len(sections))
    turned = part(ones, positions)[0]
    return turned[:n_q] @ turned[:n_k].T / d


def draw_score_svg(part: Drawable, n_q: int, *, n_k: int | None = None, size: int = 120, **which: int) -> str:
    """Return the map of a part as an SVG element: blue below 0, orange above, relative to the largest number.

    Args:
        part, n_q, n_k: as in `score_map`; large maps show evenly spaced tokens.
        size: pixels of the longer side.
        which: `head`, `heads`, `batch`, as in `score_map`.
    """
    picture = _picture(part, n_q, n_k, which)
    rows, columns = picture.shape
    unit, top = size / max(rows, columns, 1), float(picture.abs().max()) if picture.numel() else 0.0
    title = repr(part).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {columns} {rows}" '
        f'width="{columns * unit:g}" height="{rows * unit:g}" shape-rendering="crispEdges">',
        f"<title>{title}</title>",
    ]
    # One step of 32 on each side of zero is more than the eye tells apart, and lets equal neighbours share a shape.
    levels = (picture / (top or 1.0) * 32).round().nan_to_num(-32.0).clamp(-32, 32).long().tolist()
    for y, line in enumerate(levels):
        x = 0
        while x < columns:
            end = x + 1
            while end < columns and line[end] == line[x]:
                end += 1
            out.append(f'<path d="M{x} {y}h{end - x}v1h-{end - x}z" fill="{_colour(line[x] / 32)}"/>')
            x = end
    out.append("</svg>")
    return "".join(out)


def draw_score(part: Drawable, n_q: int, *, n_k: int | None = None, ax: Any = None, **which: int) -> Any:
    """Draw the map of a part with matplotlib and return the axes; arguments as in `draw_score_svg`.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise need_extra("matplotlib", "compare") from None
    picture = _picture(part, n_q, n_k, which)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(4, 4))
    top = float(picture.abs().max()) or 1.0
    image = ax.imshow(picture.tolist(), cmap="coolwarm", vmin=-top, vmax=top, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, fraction=0.05)
    ax.set_title(repr(part) if len(repr(part)) < 60 else type(part).__name__, fontsize=8)
    ax.set_xlabel("keys")
    ax.set_ylabel("queries")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def _picture(part: Drawable, n_q: int, n_k: int | None, which: dict[str, int]) -> Tensor:
    full = score_map(part, n_q, n_k=n_k, **which)
    rows, columns = (_spaced(n) for n in full.shape)
    return full[rows][:, columns]


def _spaced(n: int) -> Tensor:
    return torch.arange(n) if n <= _LIMIT else torch.arange(_LIMIT) * n // _LIMIT


def _colour(value: float) -> str:
    end = _HIGH if value > 0 else _LOW
    parts = (round(zero + (far - zero) * abs(value)) for zero, far in zip(_ZERO, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
