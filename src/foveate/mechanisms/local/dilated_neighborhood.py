"""Dilated Neighborhood Attention Transformer. arXiv 2209.15001, 2022.

Neighborhood attention whose window takes every dilation-th token: as many keys, further apart. Layers
alternate between dilation 1 (local) and a large dilation (sparse and global), so that the receptive field
grows exponentially. A learned bias per head and offset, counted in dilated steps, is added to the logits.

    q, k, v = x W                                        (B, H, N, D) each
    keys of token i along an axis: s, s + d, ..., s + (K-1) d, the K tokens congruent to i mod d nearest to it
    out_i = sum_j softmax_j(q_i . k_j / sqrt(D) + bias[h, (j - i) / d + K - 1]) v_j

A map smaller than K d is padded with zeros to K d, right and bottom, before the projections: the padded
places take part as keys (with the projections' biases), and the output is cropped. That is what the authors
do.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_tokens, refuse_causal
from foveate.mechanisms.positions import RelativeBias
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.grids import Neighborhood

PerAxis = int | Sequence[int]
WINDOWS = {1: 31, 2: 7, 3: 3}


@system(
    key="dilated_neighborhood",
    title="Dilated Neighborhood Attention Transformer",
    arxiv="2209.15001",
    year=2022,
    family="local",
    role="pattern",
    cost="O(N K C), K = prod(window)",
    fidelity="vectors",
    limits="Alone, a dilated layer never mixes tokens of different residues; alternate it with dilation 1.",
)
class DilatedNeighborhoodAttention(nn.Module):
    """Multi-head dilated neighborhood attention with a relative position bias.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: keys per axis, one integer per axis of the grids it will see.
        dilation: distance between neighbouring keys, per axis.
        qkv_bias: whether the q, k, v projections have a bias.
        bias: whether there is a relative position bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: PerAxis = (7, 7),
        dilation: PerAxis = 1,
        qkv_bias: bool = True,
        bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        window = (window, window) if isinstance(window, int) else tuple(window)
        self.dim, self.heads, self.scale, self.backend = dim, heads, scale, backend
        self.window = window
        self.dilation = Grid(*window).per_axis(dilation, "dilation")
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.position = RelativeBias(heads, window, step=self.dilation) if bias else None
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 1
    ) -> "DilatedNeighborhoodAttention":
        """Return the published 7 x 7 window (on images); odd layers get the largest dilation that fits.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "its windows look both ways and its padding is at the end")
        window = tuple(min(WINDOWS[grid.ndim], size) for size in grid)
        dilation = tuple(size // w if layer % 2 else 1 for size, w in zip(grid, window, strict=True))
        return cls(dim=dim, heads=heads, window=window, dilation=dilation)

    def padded(self, grid: Grid) -> Grid:
        """Return `grid` with axes shorter than window * dilation lengthened to that."""
        return Grid(*(max(size, w * d) for size, w, d in zip(grid, self.window, self.dilation, strict=True)))

    def where(self, grid: Grid) -> Neighborhood:
        """Return the pattern on a grid that windows fit into."""
        return Neighborhood(grid, self.window, self.dilation)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (len(self.window),))
        room = self.padded(grid)
        if room != grid:
            x = _resize(x, grid, room)
        q, k, v = self.qkv(x)
        score = self.position(room) if self.position is not None else None
        out = attend(q, k, v, where=self.where(room), score=score, scale=self.scale, backend=self.backend)
        out = merge_heads(out)
        return self.proj(out if room == grid else _resize(out, room, grid))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, dilation={self.dilation}"


def _resize(x: Float[Tensor, "b n c"], grid: Grid, to: Grid) -> Float[Tensor, "b m c"]:
    """Pad with zeros, or crop, at the end of every axis."""
    x = x.unflatten(1, grid.sizes)
    widths = [new - old for old, new in zip(grid, to, strict=True)]
    # `pad` lists axes from the last one, and crops where a width is negative.
    return pad(x, [0, 0, *(w for width in reversed(widths) for w in (0, width))]).flatten(1, -2)
