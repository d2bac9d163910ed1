"""VSA (arXiv 2204.08446): what learning the windows adds to the window attention of Swin-T."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.swin import WindowAttention
from foveate.mechanisms.local.varied_size_window import VariedSizeWindowAttention

# Swin-T on 224 x 224 pixels: (layers, side of the map, channels, heads) of its stages, windows of 7 x 7.
STAGES = ((2, 56, 96, 3), (2, 28, 192, 6), (6, 14, 384, 12), (2, 7, 768, 24))
WINDOW = 7


def figures() -> Iterator[Figure]:
    """Yield parameters, multiply-adds and attended pairs of all attention layers, with and without."""
    how = "the 12 attention layers of Swin-T, 224 x 224 pixels, windows of 7 x 7"
    layers, added, multiply, sampled, pairs, plain_pairs = 0, 0, 0, 0, 0, 0
    for depth, side, dim, heads in STAGES:
        grid = Grid(side, side)
        ours = VariedSizeWindowAttention(dim=dim, heads=heads, window=WINDOW)
        plain = WindowAttention(dim=dim, heads=heads, window=WINDOW)
        count = sum(p.numel() for p in plain.parameters())
        layers += depth * count
        added += depth * (sum(p.numel() for p in ours.parameters()) - count)
        shape = (1, heads, grid.numel, dim // heads)
        needed = explain(shape, shape, shape, where=ours.windows(grid)).pairs_needed
        pairs += depth * needed
        plain_pairs += depth * explain(shape, shape, shape, where=plain.where(grid)).pairs_needed
        # Projections once a token, q.k and weights.v once a pair.
        multiply += depth * (4 * grid.numel * dim**2 + 2 * needed * dim // heads)
        # Four pixels a key and a value; two predictors a window.
        sampled += depth * (grid.numel * 4 * 2 * dim + grid.numel // WINDOW**2 * 2 * dim * 2 * heads)
    yield Figure(
        claim="multiply-adds added to the attention layers by predicting windows and reading keys in them",
        paper="negligible",
        ours=f"{sampled / multiply:.1%} ({sampled / 1e6:.0f}M of {multiply / 1e6:.0f}M)",
        how=how,
    )
    yield Figure(
        claim="parameters added to the attention layers",
        paper="not given for these alone",
        ours=f"{added / layers:.1%} ({added / 1e3:.0f}k of {layers / 1e3:.0f}k)",
        how=how,
    )
    yield Figure(
        claim="query-key pairs, against window attention",
        paper="the same",
        ours=f"{pairs / plain_pairs:g}x",
        how=how,
    )
