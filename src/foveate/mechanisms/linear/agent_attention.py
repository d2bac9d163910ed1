"""Agent Attention: On the Integration of Softmax and Linear Attention. arXiv 2312.08874, 2023.

A few agent tokens, queries pooled over the map, first gather from all keys; then every query reads from the
agents. The product of the two softmax maps is an N x N attention of rank at most n that is never formed: a
linear attention whose features are softmaxes.

    A = pool(q)                                                              (B, H, n, D), n agents
    g = softmax(A k^T / sqrt(D) + B1) v                                      (B, H, n, D)
    out = softmax(q A^T / sqrt(D) + B2) g + depthwise_conv3x3(v)             (B, H, N, D)
    B1 = bilinear(agent_table) + row_table + column_table,  B2 likewise       (H, n, N), (H, N, n)

The bias tables belong to one map size, the `grid` of the constructor; a 7 x 7 table per agent is interpolated
to it. With `class_token=True` (the authors' DeiT form) token 0 stands before the map: it takes part in both
softmaxes with biases of its own, agents are pooled from the map alone and the convolution leaves it out. With
`reduction > 1` (the PVT form) keys and values come from a strided convolution of the map, and values are
upsampled for the depthwise convolution. The training-free variant for diffusion models is not part of this.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.scores.bias import Bias

TABLE = 7  # side of the interpolated bias tables, whatever the map


@system(
    key="agent_attention",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    arxiv="2312.08874",
    year=2023,
    family="linear",
    role="module",
    cost="O(N n C), n agents",
    fidelity="vectors",
    dims=(2,),
    sizes="the grid it was made for",
    limits="Its position biases belong to one map size.",
)
class AgentAttention(nn.Module):
    """Attention through n pooled agents, with position biases and a depthwise convolution of the values.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        grid: the 2-d map it will see; the sizes of the bias tables.
        agents: number of agents n, a square number with a side of at most the map's.
        class_token: whether one token stands before the map.
        reduction: stride of the convolution that makes keys and values, 1 for none; must divide the map.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `grid`, `agents` or `reduction`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        grid: Grid,
        agents: int = 49,
        class_token: bool = False,
        reduction: int = 1,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        grid = Grid.of(grid)
        side = math.isqrt(agents) if isinstance(agents, int) and agents > 0 else 0
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Agents are pooled from a map.")
        if side == 0 or side * side != agents or side > min(grid):
            raise bad("agents", agents, f"a square number with a side of at most {min(grid)}, for {grid}")
        if reduction < 1 or any(s % reduction for s in grid):
            raise bad("reduction", reduction, f"a positive integer that divides both sides of {grid}")
        if class_token and reduction > 1:
            raise bad(
                "reduction",
                reduction,
                "1 with class_token=True",
                "The published forms have one or the other.",
            )
        self.dim, self.heads, self.grid, self.agents = dim, heads, grid, agents
        self.side, self.class_token, self.reduction, self.backend = side, class_token, reduction, backend
        self.key_grid = Grid(*(s // reduction for s in grid))
        if reduction == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        (h, w), (kh, kw) = self.grid, self.key_grid
        self.an_bias = nn.Parameter(torch.empty(heads, agents, TABLE, TABLE))
        self.na_bias = nn.Parameter(torch.empty(heads, agents, TABLE, TABLE))
        self.ah_bias = nn.Parameter(torch.empty(1, heads, agents, kh, 1))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, agents, 1, kw))
        self.ha_bias = nn.Parameter(torch.empty(1, heads, h, 1, agents))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, w, agents))
        if class_token:
            self.ac_bias = nn.Parameter(torch.empty(1, heads, agents, 1))
            self.ca_bias = nn.Parameter(torch.empty(1, heads, 1, agents))
        self.reset_parameters()

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "AgentAttention":
        """Return 49 agents, or as many as fit the smaller side with a fourth of its length (at least 4).

        Raises:
            ArgumentError: naming `causal`, or `grid` when it is not 2-d.
        """
        refuse_causal(causal, "agents gather from all tokens")
        side = min(7, max(2, min(grid) // 4)) if min(grid) > 1 else 1
        return cls(dim=dim, heads=heads, grid=grid, agents=side * side)

    def reset_parameters(self) -> None:
        """Draw the bias tables from a truncated normal with standard deviation 0.02, as published."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def biases(self) -> tuple[Float[Tensor, "1 h n k"], Float[Tensor, "1 h q n"]]:
        """Return B1 (agents to keys) and B2 (queries to agents), class token first where there is one."""
        gather = _resize(self.an_bias, self.key_grid) + self.ah_bias + self.aw_bias
        gather = gather.flatten(3)
        read = _resize(self.na_bias, self.grid).permute(0, 1, 3, 4, 2) + self.ha_bias + self.wa_bias
        read = read.flatten(2, 3)
        if self.class_token:
            gather = torch.cat([self.ac_bias, gather], dim=3)
            read = torch.cat([self.ca_bias, read], dim=2)
        return gather, read

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid | None = None) -> Float[Tensor, "b n c"]:
        """Mix the tokens of the map (after the class token, where there is one).

        Args:
            x: tokens, `grid.numel` of them, one more with a class token.
            grid: may be left out; must be the grid of the constructor.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        lead = int(self.class_token)
        if grid is not None and grid != self.grid:
            raise bad("grid", grid, f"{self.grid}, the map its biases were made for")
        if x.dim() != 3 or x.shape[1] != self.grid.numel + lead or x.shape[2] != self.dim:
            raise bad("x", tuple(x.shape), f"(batch, {self.grid.numel + lead}, {self.dim})")
        accumulation_dtype(x.dtype)
        if self.reduction == 1:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            reduced = self.sr(_to_map(x, self.grid)).flatten(2).transpose(1, 2)
            q, (k, v) = self.q(x), self.kv(self.norm(reduced)).chunk(2, dim=-1)
        pooled = functional.adaptive_avg_pool2d(_to_map(q[:, lead:], self.grid), (self.side, self.side))
        agents = split_heads(pooled.flatten(2).transpose(1, 2), self.heads)
        # A copy, as under torch.compile (2.13) the pooled map comes with other strides than it was traced
        # with, and the fused attention kernel that was chosen for those then reads beyond it.
        agents = agents.clone(memory_format=torch.contiguous_format)
        q_heads, k_heads, v_heads = (split_heads(part, self.heads) for part in (q, k, v))
        gather, read = self.biases()
        gathered = attend(agents, k_heads, v_heads, score=Bias(gather), backend=self.backend)
        out = merge_heads(attend(q_heads, agents, gathered, score=Bias(read), backend=self.backend))
        values = _to_map(v[:, lead:], self.key_grid)
        if self.reduction > 1:
            values = functional.interpolate(values, size=self.grid.sizes, mode="bilinear")
        local = self.dwc(values).flatten(2).transpose(1, 2)
        return self.proj(out + functional.pad(local, (0, 0, lead, 0)))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, grid={self.grid}, agents={self.agents}"


def _resize(table: Float[Tensor, "h n 7 7"], grid: Grid) -> Float[Tensor, "1 h n y x"]:
    return functional.interpolate(table, size=grid.sizes, mode="bilinear").unsqueeze(0)


def _to_map(x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b c y x"]:
    return x.transpose(1, 2).unflatten(2, grid.sizes)
