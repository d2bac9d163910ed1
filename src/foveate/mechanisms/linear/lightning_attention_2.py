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

from typing import Literal, overload

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.scan.api import Backend, scan
from foveate.kernels.scan.contract import seen
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.scores.distance import alibi_slopes


@overload
def lightning_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    backend: Backend = "auto",
    chunk: int = 64,
) -> Tensor: ...
@overload
def lightning_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    backend: Backend = "auto",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]: ...
def lightning_attention_2(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    s: Tensor | None = None,
    *,
    initial_state: Float[Tensor, "b h d e"] | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
    chunk: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """The paper's operator: causal, decayed, unscaled, not normalised linear attention.

    Args:
        q, k: (B, H, N, D).
        v: (B, H, N, E).
        s: slopes >= 0 per head, (H,) or the authors' (H, 1, 1); the decay per token is exp(-s). None is
            no decay. They may carry gradients.
        initial_state: (B, H, D, E) from an earlier call.
        return_state: also return the state after the last token.
        backend, chunk: of `scan`.

    Returns:
        (B, H, N, E), and the state (B, H, D, E) if asked for.

    Raises:
        ArgumentError: naming `s`, or what `scan` refuses.
    """
    decay = None
    if s is not None:
        if q.ndim == 4 and (tuple(s.shape) not in ((q.shape[1],), (q.shape[1], 1, 1))):
            raise bad("s", tuple(s.shape), f"({q.shape[1]},) or ({q.shape[1]}, 1, 1), one slope per head")
        if seen(s < 0):
            raise bad("s", float(s.min()), "slopes >= 0", "The decay is exp(-s).")
        decay = -s.flatten()
    if return_state:
        return scan(
            q,
            k,
            v,
            decay=decay,
            initial_state=initial_state,
            return_state=True,
            backend=backend,
            chunk=chunk,
        )
    return scan(q, k, v, decay=decay, initial_state=initial_state, backend=backend, chunk=chunk)


def layer_slopes(heads: int, layer: int = 0, layers: int = 1) -> Float[Tensor, "h"]:
    """Return the slopes of one layer: ALiBi's, shrinking from the first layer to almost 0 in the last.

    Raises:
        ArgumentError: unless 0 <= layer < layers.
    """
    if not 0 <= layer < layers:
        raise bad("layer", layer, f"an index into layers={layers}")
    # A network of one layer has no last one to fade to; the authors' formula divides by zero there.
    return alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)


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
class LightningAttention2(nn.Module):
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
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "LightningAttention2":
        """Return the layer for a network of one; it takes every grid and is causal in either case."""
        return cls(dim=dim, heads=heads)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(
        self, x: Float[Tensor, "b n c"], state: Float[Tensor, "b h d d"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h d d"]]:
        """Mix a stretch of tokens that follows what `state` has seen, and return the new state too."""
        q, k, v = self.qkv(x)
        out, state = lightning_attention_2(
            silu(q),
            silu(k),
            v,
            self.slopes,
            initial_state=state,
            return_state=True,
            backend=self.backend,
            chunk=self.chunk,
        )
        return self.proj(self.norm(merge_heads(out))), state

    def step(
        self, x: Float[Tensor, "b c"], state: Float[Tensor, "b h d d"] | None = None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b h d d"]]:
        """Decode one token; the cost does not depend on how many came before."""
        out, state = self.prefill(x.unsqueeze(1), state)
        return out.squeeze(1), state

    def extra_repr(self) -> str:
        """Show the options."""
        decay = self.slopes is not None
        return f"dim={self.dim}, heads={self.heads}, decay={decay}, layer={self.layer} of {self.layers}"
