"""The two attentions of TransNeXt (arXiv 2311.17132, 2023), hosts of systems that change what their heads do.

Queries and keys have length one, and learned temperatures grow with the logarithm of how many keys a query sees. With
tau_h = softplus(t_h), e_h a learned vector per head, s = log(number of keys), and b a bias from an MLP over relative
coordinates, `CosineAttention` is

    softmax((q / |q| + e) tau s (k / |k|)^T + b) v

`AggregatedAttention` does the same over two banks of keys in one softmax: the w x w window around a token, with a
learned bias per offset, and the pooled map. Behind the softmax it adds learned weights to the window's, which depend
on the query's direction alone: (q / |q|) T_h + c_h, (B, H, N, w^2).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.kernels.banks import Bank, join_banks
from foveate.mechanisms.head_router import attend_chosen
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.patterns.grids import Halo
from foveate.patterns.pattern import check_int
from foveate.scores.after import Add
from foveate.scores.banks import on_keys
from foveate.scores.base import Score
from foveate.scores.bias import Bias, Gathered
from foveate.scores.relative import RelativeTable

Positions = tuple[Float[Tensor, "t 2"], Int[Tensor, "n l"]]


def relative_positions(
    queries: Grid, keys: Grid, *, like: Tensor, pretrained: Grid | None = None
) -> Positions:
    """Return the table of different relative coordinates, on a logarithmic scale, and which of them each pair has.

    Args:
        queries: grid of the queries.
        keys: grid of the keys, whose coordinates are means of the queries' that they stand for.
        like: gives dtype and device.
        pretrained: the grid whose extent is 8 on the linear scale; that of the queries by default.
    """
    scaled = []
    for i, n in enumerate(queries):
        at = torch.arange(n, dtype=torch.float64)
        pooled = functional.adaptive_avg_pool1d(at[None, None], keys[i])[0, 0]
        extent = max((pretrained or queries)[i] - 1, 1)
        scaled.append((at[:, None] - pooled) * 8 / extent)
    rows, columns = scaled
    pairs = torch.stack(
        [
            rows[:, None, :, None].expand(-1, columns.shape[0], -1, columns.shape[1]),
            columns[None, :, None, :].expand(rows.shape[0], -1, rows.shape[1], -1),
        ],
        dim=-1,
    )
    table, index = pairs.reshape(-1, 2).unique(dim=0, return_inverse=True)
    table = table.sign() * torch.log2(table.abs() + 1) / 3
    return table.to(like), index.reshape(queries.numel, keys.numel).to(like.device)


class ContinuousBias(nn.Module):
    """A bias per head from relative coordinates, by an MLP with one hidden layer.

    Args:
        heads: number of heads.
        hidden: width of the hidden layer.
    """

    def __init__(self, heads: int, hidden: int = 512):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads)

    def forward(self, positions: Positions) -> Float[Tensor, "h n l"]:
        """Return one bias per head and pair."""
        table, index = positions
        return self.fc2(functional.relu(self.fc1(table))).t()[:, index]


class _Cosine(nn.Module):
    """What both share: unit queries and keys, the temperature, and the query embedding."""

    def __init__(self, dim: int, heads: int, backend: str):
        super().__init__()
        width = check_heads(dim, heads)
        self.dim, self.heads, self.backend = dim, heads, backend
        # softplus of it is 1 / 0.24 at the start.
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 1 / 0.24).expm1().log())
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, width), std=0.02))
        self.cpb = ContinuousBias(heads)
        self.proj = nn.Linear(dim, dim)

    def scaled(self, unit: Float[Tensor, "b h n d"], scale: Tensor) -> Float[Tensor, "b h n d"]:
        """Return the queries whose products with unit keys are the logits."""
        return (unit + self.query_embedding) * functional.softplus(self.temperature) * scale

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, positions: Positions | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Args:
            x: tokens.
            grid: their geometry, two axes.
            positions: relative coordinates to use instead of `relative_positions`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        return self.proj(merge_heads(self.mix(x, grid, positions, None)))

    def mix(
        self, x: Tensor, grid: Grid, positions: Positions | None, chosen: Tensor | None
    ) -> Float[Tensor, "b h n d"]:
        """Return the heads' outputs; `chosen` (B, N, E) says which tokens use the last E heads, None = all."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}"


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


class CosineAttention(_Cosine):
    """Length-scaled cosine attention over the whole map.

    Args:
        dim: channels C.
        heads: number of heads.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.
    """

    def __init__(self, *, dim: int, heads: int, qkv_bias: bool = True, backend: str = "auto"):
        super().__init__(dim, heads, backend)
        self.qkv = QKV(dim, heads, bias=qkv_bias)

    def mix(self, x, grid, positions, chosen) -> Float[Tensor, "b h n d"]:
        """Return the heads' outputs."""
        q, k, v = self.qkv(x)
        q = self.scaled(_unit(q), torch.tensor(float(grid.numel), device=x.device).log().to(x))
        bias = self.cpb(relative_positions(grid, grid, like=x) if positions is None else positions)
        return attend_chosen(
            q, _unit(k), v, _all(x) if chosen is None else chosen, scale=1.0, backend=self.backend,
            score=lambda part: (Bias(bias[part]),),
        )  # fmt: skip


class AggregatedAttention(_Cosine):
    """The window around a token and the pooled map in one softmax.

    Args:
        dim: channels C.
        heads: number of heads.
        window: side of the local window, odd.
        pool: tokens per pooled one along each axis, or a Grid of pooled ones.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`; added weights need one that has the weights ("tiles", "reference").
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int = 3,
        pool: int | Grid = 8,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(dim, heads, backend)
        if check_int(window, "window", 1) % 2 == 0:
            raise bad("window", window, "an odd number")
        self.window = window
        self.pool = pool if isinstance(pool, Grid) else check_int(pool, "pool", 1)
        width, seen = dim // heads, window**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.local_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, seen), std=0.0004))
        self.local_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, width, seen), std=0.02))
        self.local_weights = nn.Parameter(torch.zeros(heads, 1, seen))

    def pooled(self, grid: Grid) -> Grid:
        """Return the grid of pooled tokens."""
        return self.pool if isinstance(self.pool, Grid) else Grid(*(max(1, n // self.pool) for n in grid))

    def window_keys(self, grid: Grid) -> tuple[Halo, Float[Tensor, "n"]]:
        """Return who sees whom in the windows, and how many keys each token's window has."""
        where = Halo(grid, 1, self.window // 2)
        rows, columns = (axis.rule(n, n).count for axis, n in zip(where.local, grid, strict=True))
        return where, (rows[:, None] * columns).flatten()

    def mix(self, x, grid, positions, chosen) -> Float[Tensor, "b h n d"]:
        """Return the heads' outputs."""
        coarse, reach = self.pooled(grid), self.window // 2
        where, count = self.window_keys(grid)
        unit = _unit(split_heads(self.q(x), self.heads))
        total = (count + coarse.numel).to(x.device).double().log().to(x.dtype)
        q = self.scaled(unit, total.unsqueeze(-1))
        maps = functional.gelu(self.sr(x.transpose(1, 2).unflatten(2, grid.sizes)))
        pooled = functional.adaptive_avg_pool2d(maps, (coarse[0], coarse[1])).flatten(2).transpose(1, 2)
        (k, v), (k_pool, v_pool) = (
            [split_heads(part, self.heads) for part in self.kv(t).chunk(2, dim=-1)]
            for t in (x, self.norm(pooled))
        )
        bias = self.cpb(relative_positions(grid, coarse, like=x) if positions is None else positions)
        joined = join_banks([Bank(_unit(k_pool), v_pool), Bank(_unit(k), v, where)], grid.numel)
        table = self.local_bias.unflatten(1, (self.window, self.window))
        added = unit @ self.local_tokens + self.local_weights

        def score(part: slice) -> tuple[Score, ...]:
            offsets = RelativeTable(table[part], grid)
            return on_keys(Bias(bias[part]), 0, coarse.numel), on_keys(offsets, coarse.numel, grid.numel)

        def offset(q, k):
            steps = [(b - a + reach).clamp(0, 2 * reach) for a, b in zip(q, k, strict=True)]
            return steps[0] * self.window + steps[1]

        def after(part: slice) -> Add:
            return Add(on_keys(Gathered(added[:, part], offset, grid=grid), coarse.numel, grid.numel))  # type: ignore

        return attend_chosen(
            q, joined.k, joined.v, _all(x) if chosen is None else chosen, where=joined.where, scale=1.0,
            score=score, after=after, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{super().extra_repr()}, window={self.window}, pool={self.pool}"


def _all(x: Float[Tensor, "b n c"]) -> Bool[Tensor, "b n 0"]:
    """Say that no head is routed."""
    return torch.ones(*x.shape[:2], 0, dtype=torch.bool, device=x.device)
