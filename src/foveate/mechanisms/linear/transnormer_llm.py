"""Scaling TransNormer to 175 Billion Parameters (TransNormerLLM). arXiv 2307.14995, 2023.

The layer of a language model without softmax: gated linear attention whose heads forget at a constant rate each, a
norm without parameters, and a gated unit without an activation. The first layer of the network also encodes the
distance of tokens in the phase of doubled features. Training weighs pairs within chunks of tokens; decoding keeps
one matrix per head and the position of the next token.

    q, k, v, u = x W                                              (B, N, 4 E), E = H D
    q, k = SiLU(q), SiLU(k);  in the first layer also             (B, H, N, D)
    q_t, k_t = [q_t cos(theta t), q_t sin(theta t)], same for k   (B, H, N, 2 D), theta learned, (H, 1, D)
    o_t = sum_{j <= t} exp(-s_h (t - j)) (q_t . k_j) v_j          no scale
    NLA(x) = (u * norm(o)) W_o                                    norm(o) = o / (|o|_2 / sqrt(E) + 1e-8)
    SGLU(x) = ((x W_1) * (x W_2)) W_3
    x = x + NLA(norm(x));  x = x + SGLU(norm(x))                  one layer
    s_h = alibi_h (1 - layer / (layers - 1) + 1e-5)               alibi_h = 2^(-8 h / H), h = 1..H

The slopes are those of the released models' code; the paper's text prints s_h = (8 h / H) (1 - layer / layers).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.scan.api import Backend
from foveate.mechanisms.decay import carry_on, layer_slopes
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.norms import SimpleRMSNorm
from foveate.mechanisms.past import Decodes, State, length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.scores.lrpe import lrpe, lrpe_angles


@system(
    key="transnormer_llm",
    title="Scaling TransNormer to 175 Billion Parameters",
    arxiv="2307.14995",
    year=2023,
    family="linear",
    role="module",
    cost="O(N C^2 / H)",
    fidelity="vectors",
    primitive="scan",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order.",
)
class NormLinearAttention(Decodes, nn.Module):
    """The token mixer (NLA); `TransNormerLayer` is the whole layer, `models.language.transnormer_llm` the model.

    Args:
        dim: channels C.
        heads: number of heads; must divide `width`.
        width: channels E of all heads together, `dim` by default.
        lrpe: whether distances are encoded in doubled features; in the released models the first layer only.
        layer, layers: position of this layer in its network, which sets how fast its heads forget.
        bias: whether the projections have one.
        backend, chunk: of `scan`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    slopes: Tensor

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        width: int | None = None,
        lrpe: bool = False,
        layer: int = 0,
        layers: int = 1,
        bias: bool = False,
        backend: Backend = "auto",
        chunk: int = 64,
    ):
        super().__init__()
        width = dim if width is None else width
        per_head = check_heads(width, heads)
        self.dim, self.heads, self.layer, self.layers = dim, heads, layer, layers
        self.backend: Backend = backend
        self.chunk = chunk
        self.register_buffer("slopes", layer_slopes(heads, layer, layers), persistent=False)
        self.qkvu = nn.Linear(dim, 4 * width, bias=bias)
        self.theta = nn.Parameter(lrpe_angles(heads, per_head)) if lrpe else None
        self.norm = SimpleRMSNorm(width)
        self.proj = nn.Linear(width, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 0, layers: int = 1
    ) -> "NormLinearAttention":
        """Return one layer of a network, the first with encoded distances; causal in either case."""
        return cls(dim=dim, heads=heads, lrpe=layer == 0, layer=layer, layers=layers)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(
        self,
        x: Float[Tensor, "b n c"],
        past: State | None = None,
        *,
        present: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Mix a stretch of tokens that follows what `past` has seen, and return the new past too.

        Args:
            x: the tokens.
            past: from an earlier call; it knows the position of the next token.
            present: False where a token is padding: nobody sees it, but it takes its place.

        Raises:
            ArgumentError: naming `present`.
        """
        q, k, v, u = self.qkvu(x).chunk(4, dim=-1)
        q, k, v = (split_heads(y, self.heads) for y in (silu(q), silu(k), v))
        if self.theta is not None:
            start = length(past)
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = lrpe(q, self.theta, positions), lrpe(k, self.theta, positions)
        if present is not None:
            if present.dtype != torch.bool or present.shape != x.shape[:2]:
                expected = f"bool of shape {tuple(x.shape[:2])}"
                raise bad("present", f"{present.dtype} {tuple(present.shape)}", expected)
            v = v.masked_fill(~present[:, None, :, None], 0.0)
        out, past = carry_on(q, k, v, self.slopes, past, backend=self.backend, chunk=self.chunk)
        return self.proj(u * self.norm(merge_heads(out))), past

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, lrpe={self.theta is not None}, "
            f"layer={self.layer} of {self.layers}"
        )


class SGLU(nn.Module):
    """Gated linear unit without an activation: ((x W_1) * (x W_2)) W_3.

    Args:
        dim: channels in and out.
        hidden: channels between.
        bias: whether the maps have one.
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = False):
        super().__init__()
        self.l1 = nn.Linear(dim, hidden, bias=bias)
        self.l2 = nn.Linear(dim, hidden, bias=bias)
        self.l3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Mix the channels."""
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerLayer(Decodes, nn.Module):
    """One layer: x + NLA(norm(x)), then x + SGLU(norm(x)).

    Args:
        dim: channels C.
        heads, width, lrpe, layer, layers, bias, backend, chunk: as in `NormLinearAttention`.
        hidden: channels inside the gated unit, `dim` by default.
    """

    def __init__(self, *, dim: int, hidden: int | None = None, bias: bool = False, **mixer):
        super().__init__()
        self.norm_mixer = SimpleRMSNorm(dim)
        self.mixer = NormLinearAttention(dim=dim, bias=bias, **mixer)
        self.norm_mlp = SimpleRMSNorm(dim)
        self.mlp = SGLU(dim, dim if hidden is None else hidden, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Apply the layer to all tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.mixer.dim)
        return self.prefill(x)[0]

    def prefill(
        self,
        x: Float[Tensor, "b n c"],
        past: State | None = None,
        *,
        present: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Apply the layer to tokens that follow `past`; see `NormLinearAttention.prefill`."""
        mixed, past = self.mixer.prefill(self.norm_mixer(x), past, present=present)
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), past
