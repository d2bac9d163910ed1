"""A2Mamba: Attention-augmented State Space Models for Visual Recognition. arXiv 2507.16624, 2025.

Half of the heads attend to a neighbourhood, half to a dilated one, which also reads what the first half made. Their
result drives a selective state space that runs over the map row by row; and before its states are read, the same
two attention maps mix them over the map, so that a state knows what lies below and beside it too.

    q, k, v = x W; halves of the heads: (q1, k1, v1), (q2, k2, v2)          (B, H/2, N, D) each
    A1, A2 = softmax(rope(q) rope(k)^T / sqrt(D) + table)  over K x K keys, dilation 1 and min(floor(Y / K), K)
    y = [A1 v1, A2 (A1 v1 + v2)]                                            (B, N, C), as a map
    u = SiLU(dwconv5x5(y));  dt, b, c = u W_x;  dt = softplus(dt W_dt + bias)        b, c: one number per token
    h_t = exp(-dt_t exp(A_log)) h_{t-1} + dt_t b_t u_t                      (B, N, C), one state per channel
    s = fuse([A1 h^(1), A2 h^(2)])                                          fuse: an H x H map over heads
    z = c s + D u
    out = W_out LN((LN(z) + dwconv5x5(v)) * SiLU(BN(x W_g)))                (B, C, Y, X)

Both halves share one table of biases. The last stage of the published networks has no state space: z is plain
attention of all pairs over the values y, with the same q and k and a bias per pair of its map (`form="global"`).

States depend on y, so that a map cannot mix values and states at once: `attend` is called again with the same
queries and keys, which computes the map anew instead of storing it. Where the first half is dilated too, the
authors' code lays its weights, taken over the dilated neighbourhood, on the states of the undilated one
(`official=True`); no published model does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu, softplus

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import apply, attend
from foveate.kernels.scan import selective_states
from foveate.mechanisms.inputs import check_heads, check_spatial, refuse_causal
from foveate.mechanisms.norms import MapNorm
from foveate.mechanisms.positions import Turns, map_turns, turned
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Neighborhood
from foveate.scores.bias import Bias
from foveate.scores.relative import RelativeTable

Mix = Callable[[Tensor], Tensor]


class MixedStates(nn.Module):
    """The selective state space whose states are mixed over the map before they are read.

    Args:
        dim: channels C.
        heads: number of heads.
        kernel: side of the depthwise convolution in front; odd.
    """

    def __init__(self, *, dim: int, heads: int, kernel: int = 5):
        super().__init__()
        self.dim, self.heads, self.rank = dim, heads, math.ceil(dim / 16)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.x_proj = nn.Linear(dim, self.rank + 2, bias=False)
        self.dt_proj = nn.Linear(self.rank, dim)
        self.A_log = nn.Parameter(torch.zeros(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.state_fusion = nn.Conv2d(heads, heads, 1)
        # Steps between 0.001 and 0.1 at the start, evenly on a logarithmic scale, as in Mamba.
        dt = torch.empty(dim).uniform_(math.log(0.001), math.log(0.1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)

    def forward(self, y: Float[Tensor, "b c y x"], first: Mix, second: Mix) -> Float[Tensor, "b c y x"]:
        """Run over the map row by row; `first` and `second` mix the states of the two halves of the heads."""
        u = silu(self.conv(y)).flatten(2).mT
        dt, b, c = self.x_proj(u).split([self.rank, 1, 1], dim=-1)
        h = self.states(u, softplus(self.dt_proj(dt)), b)
        early, late = split_heads(h, self.heads).chunk(2, dim=1)
        mixed = self.state_fusion(torch.cat([first(early), second(late)], dim=1))
        z = merge_heads(mixed) * c + u * self.D
        return z.mT.unflatten(2, y.shape[2:])

    def states(
        self, u: Float[Tensor, "b n c"], dt: Float[Tensor, "b n c"], b: Float[Tensor, "b n 1"]
    ) -> Float[Tensor, "b n c"]:
        """Return h, one state per channel, after every token."""
        A = -self.A_log.exp().unsqueeze(0)
        states = selective_states(u.unsqueeze(1), dt.unsqueeze(1), A, b.unsqueeze(1))
        return states.flatten(1, 3).to(u.dtype)  # one group, one state


@system(
    key="a2mamba",
    title="A2Mamba: Attention-augmented State Space Models for Visual Recognition",
    arxiv="2507.16624",
    year=2025,
    family="linear",
    role="module",
    cost="O(N (K^2 C + C^2))",
    layout="spatial",
    fidelity="vectors",
    primitive="attend + scan",
    dims=(2,),
    limits="Images only; an even number of heads, a multiple of 4 wide. The state space runs one way.",
)
class A2Mamba(nn.Module):
    """Attention of two neighbourhoods, reused to mix the states of a selective state space.

    Args:
        dim: channels C.
        heads: number of heads; even, their width a multiple of 4.
        window: keys per axis K; axes of the map that are shorter are taken whole.
        form: "states", or "global" for the published networks' last stage.
        grid: the map that the bias of the global form belongs to; other maps interpolate it.
        bias: whether there are biases of position.
        dilation: of the first half of the heads.
        official: lay dilated weights on undilated states, as the authors' code does.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option that does not fit.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int | Sequence[int] = 7,
        form: Literal["states", "global"] = "states",
        grid: Grid | None = None,
        bias: bool = True,
        dilation: int = 1,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        if heads % 2 or width % 4:
            raise bad("heads", heads, "an even number of heads, each a multiple of 4 channels wide")
        if form not in ("states", "global"):
            raise bad("form", form, "'states' or 'global'")
        if form == "global" and bias and grid is None:
            raise bad(
                "grid", grid, "a Grid in the global form", "It has a bias for every pair; or leave it out."
            )
        sides = Grid(1, 1).per_axis(window, "window")
        if min(sides) < 1 or dilation < 1:
            raise bad("window" if min(sides) < 1 else "dilation", (*sides, dilation), "positive integers")
        self.dim, self.heads, self.width, self.window = dim, heads, width, sides
        self.form, self.dilation, self.official, self.backend = form, dilation, official, backend
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.SiLU())
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.ssm = MixedStates(dim=dim, heads=heads) if form == "states" else None
        self.norm = MapNorm(dim, eps=1e-6)
        self.proj = nn.Sequential(MapNorm(dim, eps=1e-6), nn.Conv2d(dim, dim, 1))
        near = torch.zeros(heads // 2, *(2 * w - 1 for w in sides)) if bias else None
        self.table = None if near is None else nn.Parameter(near)
        pairs = grid.numel if form == "global" and bias and grid is not None else 0
        self.pair_bias = nn.Parameter(torch.zeros(1, heads, pairs, pairs)) if pairs else None

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> A2Mamba:
        """Return a window of 7, or less where its dilated twin would not fit; odd numbers of heads are doubled.

        Raises:
            ArgumentError: naming `grid`, `dim`, `heads` or `causal`.
        """
        refuse_causal(causal, "neighbourhoods look both ways")
        if grid.ndim != 2:
            raise bad(
                "grid", grid, "a grid with 2 axes", "Neighbourhoods and convolutions are those of maps."
            )
        check_heads(dim, heads)
        heads = heads if heads % 2 == 0 else 2 * heads
        check_heads(dim, heads)
        # Odd, and at most half an axis, so that the second half of the heads is dilated.
        fitting = tuple(max(3, min(7, (size // 2 - 1) // 2 * 2 + 1)) for size in grid)
        return cls(dim=dim, heads=heads, window=fitting)

    def neighborhoods(self, grid: Grid) -> tuple[Neighborhood, Neighborhood]:
        """Return the patterns of the two halves of the heads on a map."""
        window = tuple(min(w, size) for w, size in zip(self.window, grid, strict=True))
        far = tuple(min(size // w, w) for size, w in zip(grid, window, strict=True))
        return Neighborhood(grid, window, self.dilation), Neighborhood(grid, window, far)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Mix the pixels of `x`, any height and width.

        Raises:
            ArgumentError: naming `x`.
        """
        check_spatial(x, self.dim)
        grid = Grid(*x.shape[2:])
        qkv = self.qkv(x)
        q, k, v = (split_heads(part.mT, self.heads) for part in qkv.flatten(2).chunk(3, dim=1))
        turns = self.turns(grid, x)
        q, k = turned(q, turns), turned(k, turns)
        first, second = self._maps(q, k, grid)
        early, late = v.chunk(2, dim=1)
        early = first(early)
        y = torch.cat([early, second(early + late)], dim=1)
        if self.ssm is None:
            z = attend(q, k, y, score=self._all_pairs(grid), backend=self.backend)
            z = merge_heads(z).mT.unflatten(2, x.shape[2:])
        else:
            if self.official and self.dilation > 1:
                first = self._misplaced(q, k, grid)
            z = self.ssm(merge_heads(y).mT.unflatten(2, x.shape[2:]), first, second)
        return self.proj((self.norm(z) + self.lepe(qkv[:, -self.dim :])) * self.gate(x))

    def turns(self, grid: Grid, like: Tensor) -> Turns:
        """Return cosines and sines of what the channel pairs of a head turn by."""
        return map_turns(grid, self.width, like)

    def _maps(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Mix, Mix]:
        """The two attention maps, as functions of the values they mix."""

        def mix(part: int, where: Neighborhood) -> Mix:
            score = None if self.table is None else RelativeTable(self.table, grid, step=where.dilation)
            halves = q.chunk(2, dim=1)[part], k.chunk(2, dim=1)[part]
            return partial(attend, *halves, where=where, score=score, backend=self.backend)

        near, far = self.neighborhoods(grid)
        return mix(0, near), mix(1, far)

    def _misplaced(self, q: Tensor, k: Tensor, grid: Grid) -> Mix:
        """The first map, the weight of its j-th key laid on the j-th key of the undilated neighbourhood."""
        dilated = self.neighborhoods(grid)[0]
        unit = torch.eye(grid.numel, dtype=q.dtype, device=q.device).expand(
            *q.shape[:1], self.heads // 2, -1, -1
        )
        dense = self._maps(q, k, grid)[0](unit)
        plain = Neighborhood(grid, dilated.window)
        source, target = (
            where.dense(device=q.device)
            .nonzero()[:, 1]
            .unflatten(0, (grid.numel, -1))
            .expand(*dense.shape[:3], -1)
            for where in (dilated, plain)
        )
        return partial(apply, torch.zeros_like(dense).scatter(-1, target, dense.gather(-1, source)))

    def _all_pairs(self, grid: Grid) -> Bias | None:
        """The bias of every pair, stretched as a picture where the map is not its own."""
        if self.pair_bias is None:
            return None
        n, bias = grid.numel, self.pair_bias
        return Bias(bias if bias.shape[-1] == n else interpolate(bias, size=(n, n), mode="bicubic"))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, form={self.form!r}"
