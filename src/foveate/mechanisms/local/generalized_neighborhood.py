"""Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light.
arXiv 2504.16922, 2025.

Neighborhood attention with one more number per axis, the stride: `stride` consecutive tokens share the
window of their leader. Stride 1 is neighborhood attention, stride = window is blocked (window) attention,
and in between windows move in steps, which lines them up with the tiles a kernel works in: then no tile is
partly wasted and the saving in pairs becomes a saving in time.

    along an axis, inside a dilation group of length L, with window K and stride s:
    leader l = min(p // s * s + s // 2, L - 1),   keys of p: [a, a + K),  a = clamp(l - K // 2, 0, L - K)
    causal:  l = min(p // s * s + s - 1, L - 1),  keys of p: [max(l - K + 1, 0), p + 1)
    out_i  = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D)) v_j           q, k, v, out (B, H, N, D)

`simulate` answers, before anything runs, how much of that saving a tiling keeps; `foveate explain --simulate`
looks for strides and tilings with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.mechanisms.inputs import frozen
from foveate.mechanisms.local.fused_neighborhood_attention import NeighborhoodAttention, PerAxis
from foveate.patterns.axis import AxisRule
from foveate.patterns.grids import Neighborhood

# Window and stride per axis for 1-, 2- and 3-d grids: a power of two of keys, in steps of half a window.
DEFAULTS = {1: (64, 32), 2: (8, 4), 3: (4, 2)}


@system(
    key="generalized_neighborhood",
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    arxiv="2504.16922",
    year=2025,
    family="local",
    role="pattern",
    cost="O(N K C), K = prod(window)",
    fidelity="vectors",
    causal="optional",
    sizes="every axis at least window * dilation",
)
class GeneralizedNeighborhoodAttention(NeighborhoodAttention):
    """Multi-head neighborhood attention whose windows move in strides.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: keys per axis; an integer serves grids of any number of axes.
        stride: tokens that share a window, per axis, 1 to `window`.
        dilation, causal, qkv_bias, scale, backend: as in `NeighborhoodAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: PerAxis = 8,
        stride: PerAxis = 4,
        dilation: PerAxis = 1,
        causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(
            dim=dim,
            heads=heads,
            window=window,
            dilation=dilation,
            causal=causal,
            qkv_bias=qkv_bias,
            scale=scale,
            backend=backend,
        )
        self.stride = frozen(stride)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "GeneralizedNeighborhoodAttention":
        """Return a window of 8 x 8 in strides of 4 (on images), cut to the axes of `grid`."""
        window, stride = DEFAULTS[grid.ndim]
        return cls(
            dim=dim,
            heads=heads,
            window=tuple(min(window, size) for size in grid),
            stride=tuple(min(stride, size) for size in grid),
            causal=causal,
        )

    def where(self, grid: Grid) -> Neighborhood:
        """Return the pattern on `grid`.

        Raises:
            ArgumentError: naming `window`, `stride`, `dilation` or `causal` when it does not fit the grid.
        """
        return Neighborhood(grid, self.window, self.dilation, self.stride, self.causal)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{super().extra_repr()}, stride={self.stride}"


@dataclass(frozen=True)
class Simulation:
    """What a tiling makes of a neighborhood.

    Attributes:
        visited: key tiles visited, over all query tiles.
        dense: key tiles dense attention would visit.
        perfect: whether every visited tile is needed entirely ("fully block-sparse").
    """

    visited: int
    dense: int
    perfect: bool

    @property
    def bound(self) -> float:
        """Upper bound of the speed-up over dense attention with the same tiles."""
        return self.dense / self.visited


def simulate(where: Neighborhood, query_tile: PerAxis, key_tile: PerAxis) -> Simulation:
    """Count the key tiles that multi-dimensional tiles of queries visit (our derivation of NATTENSim).

    Tiles start at the origin of the grid; with dilation, at the origin of each dilation group, as kernels
    that permute tokens into groups do. O(sum of the axes), whatever the number of tokens.

    Args:
        where: the neighborhood.
        query_tile: queries of a tile, per axis.
        key_tile: keys of a tile, per axis.

    Raises:
        ArgumentError: naming `query_tile` or `key_tile`.
    """
    tiles_q = where.grid.per_axis(query_tile, "query_tile")
    tiles_k = where.grid.per_axis(key_tile, "key_tile")
    for name, tile in (("query_tile", tiles_q), ("key_tile", tiles_k)):
        if min(tile) < 1:
            raise bad(name, tile, "positive integers")
    visited, dense, perfect = 1, 1, True
    axes = where.axes()
    assert axes is not None
    for rule, dilation, tq, tk in zip(axes, where.dilation, tiles_q, tiles_k, strict=True):
        seen, every, whole = axis_visits(rule, dilation, tq, tk)
        visited, dense, perfect = visited * seen, dense * every, perfect and whole
    return Simulation(visited, dense, perfect)


def axis_visits(rule: AxisRule, dilation: int, query_tile: int, key_tile: int) -> tuple[int, int, bool]:
    """Return what `simulate` multiplies over the axes: key tiles visited, those of dense attention, all whole?

    Args:
        rule: the keys of each position of the axis.
        dilation: how many groups the axis is dealt into.
        query_tile: positions of a query tile.
        key_tile: positions of a key tile.
    """
    seen = every = 0
    perfect = True
    for group in range(dilation):
        # Keys as positions inside the dilation group; a last, smaller tile repeats its last query.
        first = (rule.start[group::dilation] - group) // dilation
        last = first + rule.count[group::dilation]
        queries, keys = len(first), math.ceil((rule.n_k - group) / dilation)
        tiles = math.ceil(queries / query_tile)
        at = torch.arange(tiles * query_tile).clamp(max=queries - 1).view(tiles, query_tile)
        starts, stops = first[at], last[at]
        low, high = starts.amin(1) // key_tile, -(-stops.amax(1) // key_tile)
        seen += int((high - low).sum())
        every += tiles * math.ceil(keys / key_tile)
        whole = (starts.amax(1) <= low * key_tile) & (stops.amin(1) >= (high * key_tile).clamp(max=keys))
        perfect &= bool(whole.all())
    return seen, every, perfect


def block_sparse_strides(where: Neighborhood, query_tile: PerAxis, key_tile: PerAxis) -> Sequence[int]:
    """Return the strides (the same on every axis) that make a neighborhood fully block-sparse, ascending."""
    widest = min(where.window)
    return [
        s
        for s in range(1, widest + 1)
        if simulate(
            Neighborhood(where.grid, where.window, where.dilation, s, where.causal), query_tile, key_tile
        ).perfect
    ]
