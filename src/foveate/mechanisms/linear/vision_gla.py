"""ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention. arXiv 2405.18425, 2024.

Gated linear attention for images: a matrix of D_k x D_v numbers per head is carried over the tokens in row-major
order, once forwards and once backwards, and forgets every key channel at a rate that each token decides. Queries,
keys and values are shared by the two directions, the forget gates are not. What a raster cannot see, the
neighbour above, comes from a 3 x 3 depthwise convolution before the projections; its output is also mixed in
after them, under a gate. Cost is linear in the number of tokens.

    u = SiLU(dwconv3x3(x))                                                  (B, N, C)
    q, k, v = u W_q, u W_k, u W_v            (B, H, N, D_k), (B, H, N, D_k), (B, H, N, D_v), D_v = C / H
    [a, a'] = logsigmoid(u W_1 W_2 + b) / 16                                each (B, H, N, D_k)
    S_t = diag(exp a_t) S_{t-1} + k_t v_t^T,    o_t = q_t S_t / sqrt(D_k);  S'_t, o'_t likewise backwards with a'
    y = g . RMSNorm((o + o') / 2) + (1 - g) . RMSNorm(u),  g = sigmoid(u W_g + b_g),  norms over D_v per head
    out = y W_o

Both directions hold a token's own pair, so it counts twice before the half. Rotary positions, an option of the
authors' training code that their evaluation leaves out and no published model uses, are not part of this, nor is
a class token. In evaluation the authors' code halves o + o' twice; RMSNorm hides that but for its epsilon
(`official=True`).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.scan.api import Backend, scan
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads

GAIN = 2**-2.5  # of the Xavier initialisation of every projection


@system(
    key="vision_gla",
    title="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    arxiv="2405.18425",
    year=2024,
    family="linear",
    role="linear-kernel + gate",
    cost="O(N C^2 / H)",
    fidelity="vectors",
    primitive="scan",
    dims=(2,),
)
class VisionGLA(nn.Module):
    """Bidirectional gated linear attention with direction-wise gates and a local branch.

    Args:
        dim: channels C.
        heads: number of heads H; must divide `dim` and `dim * expand_k`.
        expand_k: width of all keys together over `dim`.
        rank: width of the bottleneck of the forget gates.
        normalizer: log decays are divided by it, so that gates start close to 1.
        floor: smallest log decay per token, None for no bound.
        eps: of the two norms.
        out_act: whether a SiLU stands before the output projection.
        conv_act: whether a SiLU follows the convolution.
        conv_bias: whether the convolution has a bias.
        official: halve o + o' once more out of training mode, as the authors' evaluation does.
        backend: of `scan`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        expand_k: float = 0.5,
        rank: int = 16,
        normalizer: float = 16.0,
        floor: float | None = None,
        eps: float = 1e-6,
        out_act: bool = False,
        conv_act: bool = True,
        conv_bias: bool = False,
        official: bool = False,
        backend: Backend = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        keys = int(dim * expand_k)
        if keys < heads or keys % heads:
            raise bad(
                "expand_k", expand_k, f"dim * expand_k a multiple of heads={heads}, not {dim * expand_k:g}"
            )
        if floor is not None and floor > 0:
            raise bad("floor", floor, "a log decay <= 0, or None")
        self.dim, self.heads, self.keys, self.normalizer, self.floor = dim, heads, keys, normalizer, floor
        self.out_act, self.conv_act, self.official = out_act, conv_act, official
        self.backend: Backend = backend
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=conv_bias)
        self.qkv = nn.Linear(dim, 2 * keys + dim, bias=False)
        self.forget = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, 2 * keys))
        self.gate = nn.Linear(dim, dim)
        self.norm = nn.RMSNorm(width, eps=eps)
        self.local_norm = nn.RMSNorm(width, eps=eps)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "VisionGLA":
        """Return the layer; keys are half as wide as values, as published, where the heads can share them out."""
        refuse_causal(causal, "every token hears of those after it")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Its local branch is a 3 x 3 convolution.")
        check_heads(dim, heads)
        return cls(dim=dim, heads=heads, expand_k=0.5 if dim % (2 * heads) == 0 else 1.0)

    def reset_parameters(self) -> None:
        """Draw every projection and the convolution as Xavier did, with the published gain of 2^-2.5."""
        for part in (self.conv, self.qkv, *self.forget, self.gate, self.proj):
            nn.init.xavier_uniform_(part.weight, gain=GAIN)  # type: ignore[arg-type]

    def log_decays(
        self, u: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b h n dk"], Float[Tensor, "b h n dk"]]:
        """Return the log decays of the forward and of the backward direction."""
        decay = logsigmoid(self.forget(u)) / self.normalizer
        if self.floor is not None:
            decay = decay.clamp(min=self.floor)
        forwards, backwards = decay.chunk(2, dim=-1)
        return split_heads(forwards, self.heads), split_heads(backwards, self.heads)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        u = self.conv(x.transpose(1, 2).unflatten(2, grid.sizes)).flatten(2).transpose(1, 2)
        if self.conv_act:
            u = silu(u)
        q, k, v = self.qkv(u).split([self.keys, self.keys, self.dim], dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        o = both_directions(q, k, v, *self.log_decays(u), backend=self.backend)
        if self.official and not self.training:
            o = o / 2
        mixed, local = self.norm(o), self.local_norm(split_heads(u, self.heads))
        gate = split_heads(self.gate(u).sigmoid(), self.heads)
        y = merge_heads(mixed * gate + local * (1 - gate))
        return self.proj(silu(y) if self.out_act else y)

    def extra_repr(self) -> str:
        """Show the options."""
        shown = f"dim={self.dim}, heads={self.heads}, keys={self.keys}, normalizer={self.normalizer}"
        return shown + (f", floor={self.floor}" if self.floor is not None else "")


def both_directions(
    q: Float[Tensor, "b h n dk"],
    k: Float[Tensor, "b h n dk"],
    v: Float[Tensor, "b h n dv"],
    forwards: Float[Tensor, "b h n dk"],
    backwards: Float[Tensor, "b h n dk"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b h n dv"]:
    """Return the mean of a forward and a backward gated scan, each with its own log decays and each token's own pair.

    The directions are heads of one scan. Queries are scaled by 1 / sqrt(D_k).
    """
    q, k, v = (torch.cat([x, x.flip(2)], dim=1) for x in (q, k, v))
    decay = torch.cat([forwards, backwards.flip(2)], dim=1)
    there, back = scan(q, k, v, decay=decay, scale=q.shape[-1] ** -0.5, backend=backend).chunk(2, dim=1)
    return (there + back.flip(2)) / 2


class VisionGLABlock(nn.Module):
    """The published block: x + mixer(RMSNorm(x)), then x + mlp(RMSNorm(x)).

    Args:
        mixer: the attention.
        mlp_ratio: hidden width over channels.
        act: "silu" (as published) or "gelu".
        swiglu: a gated MLP of hidden width 2/3 mlp_ratio C, rounded up to a multiple of 256, without biases.
        layer_scale: initial value of a factor per channel on both branches, None for none.
    """

    def __init__(
        self,
        *,
        mixer: VisionGLA,
        mlp_ratio: float = 4.0,
        act: str = "silu",
        swiglu: bool = False,
        layer_scale: float | None = None,
    ):
        super().__init__()
        if act not in ("silu", "gelu"):
            raise bad("act", act, '"silu" or "gelu"')
        dim = mixer.dim
        hidden = int(dim * mlp_ratio)
        if swiglu:
            hidden = -(-int(dim * mlp_ratio * 2 / 3) // 256) * 256
        self.mixer, self.swiglu = mixer, swiglu
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 2 * hidden if swiglu else hidden, bias=not swiglu)
        self.fc2 = nn.Linear(hidden, dim, bias=not swiglu)
        self.act = nn.SiLU() if act == "silu" else nn.GELU()
        self.scales = None
        if layer_scale is not None:
            self.scales = nn.Parameter(torch.full((2, dim), float(layer_scale)))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the block to the tokens of `grid`."""
        first, second = (1.0, 1.0) if self.scales is None else self.scales
        x = x + first * self.mixer(self.norm1(x), grid)
        return x + second * self._mlp(self.norm2(x))

    def _mlp(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.swiglu:
            gate, y = y.chunk(2, dim=-1)
            return self.fc2(self.act(gate) * y)
        return self.fc2(self.act(y))
