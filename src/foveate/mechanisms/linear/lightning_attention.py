"""Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention. arXiv 2405.17381, 2024.

Causal linear attention whose heads forget at a constant rate each, in a layer made for language models. Tokens are
taken in blocks: inside a block every pair is weighed, between blocks only one D x D matrix per head travels, so
that a token costs the same at every length, and decoding keeps no keys. There is no softmax and no normaliser; a
LayerNorm over all channels keeps the size of the sums in check, and a narrow gate chooses among its channels.

    q, k, v = SiLU(x W_q), SiLU(x W_k), SiLU(x W_v)               (B, H, N, D), D = C / H
    o_t = sum_{j <= t} exp(-s_h (t - j)) (q_t . k_j) v_j          S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = q_t S_t
    out = (LayerNorm(o) * sigmoid(x W_1 W_2)) W_o                 (B, N, C), W_1 (C, D), W_2 (D, C)
    s_h = alibi_h (1 - layer / (layers - 1) + 1e-5)               alibi_h = 2^(-8 h / H), h = 1..H

The slopes are those of the released code. The paper's text prints others, s_h = (8 h / H) (1 - layer / layers);
set the buffer `slopes` for these.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.scan.api import Backend
from foveate.mechanisms.decay import carry_on, layer_slopes
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, State
from foveate.mechanisms.projections import QKV, merge_heads


@system(
    key="lightning_attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    year=2024,
    family="linear",
    role="module",
    cost="O(N C^2 / H)",
    fidelity="vectors",
    primitive="scan",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order.",
)
class LightningAttention(Decodes, nn.Module):
    """Decayed linear attention with a norm and a low-rank output gate.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        decay: whether heads forget; without decay this is plain causal linear attention.
        layer, layers: position of this layer in its network, which sets how fast its heads forget.
        bias: whether the projections have one.
        backend, chunk: of `scan`.

    Raises:
        ArgumentError: naming the argument that does not fit.
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
        width = check_heads(dim, heads)
        self.dim, self.heads, self.layer, self.layers = dim, heads, layer, layers
        self.backend: Backend = backend
        self.chunk = chunk
        slopes = layer_slopes(heads, layer, layers)
        self.register_buffer("slopes", slopes if decay else None, persistent=False)
        self.qkv = QKV(dim, heads, bias=bias)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Sequential(nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias))
        self.proj = nn.Linear(dim, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False, layer: int = 0, layers: int = 1
    ) -> "LightningAttention":
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
        q, k, v = (silu(y) for y in self.qkv(x))
        out, past = carry_on(q, k, v, self.slopes, past, backend=self.backend, chunk=self.chunk)
        return self.proj(self.norm(merge_heads(out)) * self.gate(x).sigmoid()), past

    def extra_repr(self) -> str:
        """Show the options."""
        decay = self.slopes is not None
        return f"dim={self.dim}, heads={self.heads}, decay={decay}, layer={self.layer} of {self.layers}"
