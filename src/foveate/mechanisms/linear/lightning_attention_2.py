"""Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models.
arXiv 2401.04658, 2024.

Causal linear attention whose weights fade with distance: head h forgets at a constant rate exp(-s_h) per
token. Inside a tile of tokens the weights are written out, between tiles only a D x E state travels, so
that cost is linear and decoding keeps a constant state. There is no softmax, no 1/sqrt(D) and no
normaliser, so outputs grow with N where s is small and a norm has to follow.

    o_t = sum_{j <= t} exp(-s_h (t - j)) (q_t . k_j) v_j       q, k (B, H, N, D), v (B, H, N, E), s (H,) >= 0
    S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = q_t S_t        the same, with a state S (B, H, D, E)

The paper publishes the operator. The layer around it is the one of TransNormerLLM, for which it was made:

    q, k = SiLU(x W_q), SiLU(x W_k),  v = x W_v                   (B, H, N, D), D = C / H
    out  = RMSNorm_C(o) W_o                                       (B, N, C)
    s_h  = alibi_h (1 - layer / (layers - 1) + 1e-5)              alibi_h = 2^(-8 h / H), h = 1..H
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.scan.api import Backend
from foveate.mechanisms.decay import carry_on, decayed_attention, layer_slopes
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, State
from foveate.mechanisms.projections import QKV, merge_heads

# The operator is what the paper publishes.
lightning_attention_2 = decayed_attention


@system(
    key="lightning_attention_2",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths "
    "in Large Language Models",
    arxiv="2401.04658",
    year=2024,
    family="linear",
    role="linear-kernel",
    cost="O(N C^2 / H)",
    fidelity="vectors",
    primitive="scan",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order.",
)
class LightningAttention2(Decodes, nn.Module):
    """Decayed linear attention with projections and the norm it needs.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        decay: whether heads forget; without decay this is plain causal linear attention.
        layer, layers: position of this layer in its network, which sets how fast its heads forget.
        bias: whether the projections have one.
        backend, chunk: of `scan`.
    """

    slopes: Tensor | None

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        decay: bool = True,
        layer: int = 0,
        layers: int = 1,
        bias: bool = False,
        backend: Backend = "auto",
        chunk: int = 64,
    ):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.layer, self.layers = dim, heads, layer, layers
        self.backend: Backend = backend
        self.chunk = chunk
        slopes = layer_slopes(heads, layer, layers)
        self.register_buffer("slopes", slopes if decay else None, persistent=False)
        self.qkv = QKV(dim, heads, bias=bias)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 0, layers: int = 1
    ) -> "LightningAttention2":
        """Return one layer of a network; it takes every grid and is causal in either case."""
        return cls(dim=dim, heads=heads, layer=layer, layers=layers)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(
        self, x: Float[Tensor, "b n c"], past: State | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Mix a stretch of tokens that follows what `past` has seen, and return the new past too."""
        q, k, v = self.qkv(x)
        out, past = carry_on(silu(q), silu(k), v, self.slopes, past, backend=self.backend, chunk=self.chunk)
        return self.proj(self.norm(merge_heads(out))), past

    def extra_repr(self) -> str:
        """Show the options."""
        decay = self.slopes is not None
        return f"dim={self.dim}, heads={self.heads}, decay={decay}, layer={self.layer} of {self.layers}"
