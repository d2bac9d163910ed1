"""HaloNet: what gathering a window once a block saves in memory and costs in arithmetic, and what H1 weighs."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.local.halonet import HaloAttention
from foveate.patterns.grids import Halo


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    side, block, halo = 64, 8, 3
    grid = Grid(side, side)
    window = block + 2 * halo
    blocks = (side // block) ** 2
    single = 2 * halo + 1
    yield Figure(
        claim="keys gathered a query, against windows of each pixel's own of the same reach (7 x 7)",
        paper=f"(b + 2h)^2 / b^2 = {window**2 / block**2:.2f} against k^2 = {single**2}",
        ours=f"{blocks * window**2 / grid.numel:.2f} against {single**2}",
        how=f"{grid}, block {block}, halo {halo}",
    )
    where = Halo(grid, block, halo, border="zero")
    pairs = int(where.dense().sum()) + where.phantoms()
    yield Figure(
        claim="pairs computed a query, padding included",
        paper=f"(b + 2h)^2 = {window**2}",
        ours=f"{pairs / grid.numel:g}",
        how=f"{grid}, block {block}, halo {halo}, counted from the pattern",
    )
    layer = HaloAttention(dim=64, heads=4, block=block, halo=halo)
    yield Figure(
        claim="parameters of a layer: three 1 x 1 convolutions and two tables of 2 (b + 2h) - 1 embeddings",
        paper="not given",
        ours=str(sum(p.numel() for p in layer.parameters())),
        how="C = 64, 4 heads, block 8, halo 3",
    )
