"""Efficient-vDiT: what the masks save, counted in pairs of queries and keys."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.local.efficient_vdit import attention_tile
from foveate.patterns.lower import lower

SPACE = (45, 80)  # latent tokens of a frame of 720 x 1280 pixels: compression 8, patches of 2


def figures() -> Iterator[Figure]:
    """Yield the figures."""

    def pairs(frames: int, references: int) -> int:
        grid = Grid(frames, *SPACE)
        return lower(attention_tile(grid, references), grid.numel).pairs_computed

    yield Figure(
        claim="attention cost when the video is twice as long, reference frames unchanged",
        paper="linear in the number of frames (4x in full attention)",
        ours=f"{pairs(48, 3) / pairs(24, 3):.2f}x",
        how=f"24 and 48 latent frames of {SPACE[0]} x {SPACE[1]} tokens, 3 reference frames",
    )
    for length, frames in ((29, 8), (93, 24)):
        n = frames * SPACE[0] * SPACE[1]
        bounds = ", ".join(f"{n * n / pairs(frames, k):.2f}x with {k}" for k in (1, 2, 4))
        yield Figure(
            claim=f"upper bound of the attention's speed-up at {length} frames, by reference frames",
            paper="not given per mask; 7.4x to 7.8x for the whole method, distillation in time included",
            ours=bounds,
            how=f"{frames} latent frames (compression 4 in time) of {SPACE[0]} x {SPACE[1]} tokens, in pairs",
        )
