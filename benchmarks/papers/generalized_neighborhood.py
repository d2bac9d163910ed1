"""Generalized neighborhood attention: the bounds its simulator gives, found again by searching strides."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.cost.simulate import worth_choosing
from foveate.mechanisms.local.generalized_neighborhood import simulate
from foveate.patterns.grids import Neighborhood

# Name, grid, window, the published stride, tile shapes (queries, keys) and the published bound.
LAYERS = [
    ("1-d", (32768,), (2048,), (256,), (128,), (128,), "16x"),
    ("FLUX at 4K", (256, 256), (80, 80), (16, 16), (16, 16), (16, 8), "10.2x"),
    ("HunyuanVideo", (30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), "11.1x"),
]
COSMOS = [((12, 24), "92%"), ((20, 40), "77%"), ((28, 56), "55%")]


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    for name, sizes, window, stride, query_tile, key_tile, paper in LAYERS:
        strided = simulate(Neighborhood(sizes, window, stride=stride), query_tile, key_tile)
        plain = simulate(Neighborhood(sizes, window), query_tile, key_tile)
        yield Figure(
            claim=f"bound of the speed-up over dense attention, {name}",
            paper=paper,
            ours=f"{strided.bound:.3g}x (stride 1: {plain.bound:.3g}x)",
            how=f"grid {sizes}, window {window}, stride {stride}, tiles {query_tile} and {key_tile}",
        )
    found = worth_choosing(Neighborhood((32768,), 2048))
    first = {name: next(c.stride[0] for c in choices if c.result.perfect) for name, choices in found.items()}
    yield Figure(
        claim="smallest stride that is fully block-sparse",
        paper="256",
        ours=", ".join(f"{stride} with tiles of {name}" for name, stride in first.items()),
        how="32768 tokens, window 2048, every stride tried",
    )
    for window, paper in COSMOS:
        where = Neighborhood((44, 80), window, stride=(4, 8))
        result = simulate(where, (4, 8), (4, 8))
        yield Figure(
            claim=f"sparsity of Cosmos-Predict2's layers with a window of {window[0]} x {window[1]}",
            paper=paper,
            ours=f"{1 - 1 / result.bound:.1%}" + (", fully block-sparse" if result.perfect else ""),
            how="frames of 44 x 80, stride 4 x 8, tiles of 4 x 8",
        )
