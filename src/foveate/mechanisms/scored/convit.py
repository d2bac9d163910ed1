"""ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases. arXiv 2103.10697, 2021.

Gated positional self-attention (GPSA). Every head mixes two attentions over the same values: one by content
and one by position alone, with a learned gate per head. The positional one is initialised so that the heads
of a layer look at the cells of a k x k convolution (H = k^2 heads); training may open the gate to content.

    S = softmax_j(q_i . k_j / sqrt(D))                                      (B, H, N, N)
    P = softmax_j(w_h . (dx, dy, dx^2 + dy^2) + b_h), d = position(j) - position(i)    (H, N, N)
    out = ((1 - sigmoid(g_h)) S + sigmoid(g_h) P) v                         (B, H, N, D)

P does not depend on the input and only on the offset, so its logits are a relative table of
(2 H_grid - 1) x (2 W_grid - 1) numbers per head, made anew from the three weights at every size.
Unlike the authors' code the map may be rectangular; their final division by the row sum changes nothing
(rows of a convex mixture sum to one) and is left out.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.scores.relative import RelativeTable


@system(
    key="convit",
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    arxiv="2103.10697",
    year=2021,
    family="scored",
    role="score",
    cost="O(N^2 C)",
    fidelity="vectors",
    dims=(2,),
    limits="Dense: two N x N attentions share their values.",
)
class GatedPositionalAttention(nn.Module):
    """Content attention and positional attention, mixed by a gate per head.

    Args:
        dim: channels C.
        heads: number of heads; a square number to start as a convolution (others start at random).
        qkv_bias: whether the q, k, v projections have a bias.
        locality_strength: alpha, how sharply the positional heads look at their cell at the start.
        local_init: start as a convolution; otherwise positions start at random like every projection.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        qkv_bias: bool = False,
        locality_strength: float = 1.0,
        local_init: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.backend = dim, heads, backend
        self.locality_strength, self.local_init = locality_strength, local_init
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, heads)
        self.gating_param = nn.Parameter(torch.ones(heads))
        self.reset_parameters()

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "GatedPositionalAttention":
        """Return the published layer.

        Raises:
            ArgumentError: naming `causal`, or `grid` when it is not 2-d.
        """
        refuse_causal(causal, "positional heads look at all offsets")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Positions are (dx, dy).")
        return cls(dim=dim, heads=heads)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: normal projections, identity values, one head per kernel cell."""
        for linear in (self.qk, self.v, self.proj, self.pos_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.ones_(self.gating_param)
        if not self.local_init:
            return
        nn.init.eye_(self.v.weight)
        side = int(self.heads**0.5)
        center = (side - 1) / 2 if side % 2 == 0 else side // 2
        for row in range(side):
            for column in range(side):
                # -|d - (column, row)|^2 without its constant, d = (dx, dy)
                weight = [2 * (column - center), 2 * (row - center), -1.0]
                self.pos_proj.weight[row + side * column] = torch.tensor(weight)
        self.pos_proj.weight.mul_(self.locality_strength)

    def position(self, grid: Grid) -> RelativeTable:
        """Return the positional logits on `grid` as a table over offsets (key minus query)."""
        dy, dx = (torch.arange(1 - s, s, device=self.pos_proj.weight.device) for s in grid)
        dy, dx = torch.meshgrid(dy, dx, indexing="ij")
        offsets = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).to(self.pos_proj.weight.dtype)
        return RelativeTable(self.pos_proj(offsets).permute(2, 0, 1), grid, sign="key-query")

    def _mix(self, x: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """Return content and positional attention over `values (B, H, N, D_v)`, mixed by the gates."""
        q, k = (split_heads(part, self.heads) for part in self.qk(x).chunk(2, dim=-1))
        content = attend(q, k, values, backend=self.backend)
        # No content: one coordinate that is zero for all leaves the positions alone to decide.
        nothing = values.new_zeros(1, self.heads, grid.numel, 1)
        positional = attend(nothing, nothing, values, score=self.position(grid), backend=self.backend)
        gate = torch.sigmoid(self.gating_param).reshape(-1, 1, 1).to(content.dtype)
        return (1 - gate) * content + gate * positional

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        return self.proj(merge_heads(self._mix(x, split_heads(self.v(x), self.heads), grid)))

    def attention_map(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b h n n"]:
        """Return the mixed weights, N x N of them per head: for pictures and `nonlocality`."""
        check_tokens(x, grid, self.dim, (2,))
        identity = torch.eye(grid.numel, dtype=x.dtype, device=x.device).expand(
            x.shape[0], self.heads, -1, -1
        )
        return self._mix(x, identity, grid)

    def nonlocality(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "h"]:
        """Return how far each head looks on average, in tokens (the paper's non-locality metric)."""
        coords = grid.coords(device=x.device).to(x.dtype)
        distance = torch.cdist(coords, coords, compute_mode="donot_use_mm_for_euclid_dist")
        return (self.attention_map(x, grid) * distance).sum(-1).mean((0, 2))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, locality_strength={self.locality_strength}"
