"""PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention. arXiv 2503.03588, 2025.

A causal mask that is fixed beforehand: every query sees the first blocks of the sequence, a few latest blocks,
and the blocks 1, 2, 4, 8, ... blocks back. That is O(log N) blocks a query, and yet d layers carry what stands
up to 2^d blocks back, as any distance is a sum of powers of two: a window of as many keys would reach d times
its width.

    q (B, H, N, D), k, v (B, H_kv, N, D);  b(i) = i // block,  delta = b(i) - b(j)
    A(i) = { j <= i : b(j) < sinks  or  delta < window  or  delta & (delta - 1) = 0 }
    out_i = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D)) v_j

Distances are counted in blocks, causality in tokens. From the paper's printed algorithm: the vectors this is
equal to are a transcription of it, the authors' own code was not at hand. The published models are decoders with
rotary positions that were trained on with this mask; the layer here has no positions of its own.
"""

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.power import PowerBlocks


def power_attention(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b hk n_k d"],
    v: Float[Tensor, "b hk n_k dv"],
    *,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q dv"]:
    """Attend to sinks, to the latest blocks and to blocks at power-of-two distances.

    Args:
        q: queries; they stand at the end of the keys, so that decoding needs no other call.
        k, v: fewer heads than q has are repeated.
        block, window, sinks: as in `PowerBlocks`; the defaults are published, for 32 thousand tokens.
        scale: of the logits; 1 / sqrt(D) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    return attend(q, k, v, where=PowerBlocks(block, window, sinks), scale=scale, backend=backend)


@system(
    key="power_attention",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    arxiv="2503.03588",
    year=2025,
    family="local",
    role="pattern",
    cost="O(N b log(N / b) C), blocks of b",
    fidelity="paper",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order. One layer sees far "
    "blocks only at power-of-two distances; a network needs about log2(N / b) layers to reach all. All keys are "
    "kept when decoding, as later queries come back to them.",
)
class PowerAttention(Decodes, nn.Module):
    """Causal multi-head attention over blocks at power-of-two distances, for training and decoding.

    Args:
        dim: channels C.
        heads: number of query heads; must divide `dim`.
        kv_heads: number of key and value heads, as many as queries by default; must divide `heads`.
        block: tokens of a block.
        window: the latest blocks, seen whole.
        sinks: the first blocks, seen by all.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        block: int = 256,
        window: int = 5,
        sinks: int = 1,
        qkv_bias: bool = False,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        self.dim, self.heads, self.scale, self.backend = dim, heads, scale, backend
        self.where = PowerBlocks(block, window, sinks)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, width * self.kv_heads, bias=qkv_bias)
        self.v = nn.Linear(dim, width * self.kv_heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "PowerAttention":
        """Return blocks of N / 128 tokens, 256 of them at most as published; causal in either case."""
        return cls(dim=dim, heads=heads, block=min(256, max(1, grid.numel // 128)))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(self, x: Float[Tensor, "b n c"], past: Past | None = None) -> tuple[Tensor, Past]:
        """Mix a stretch of tokens that follows `past`; return the output (B, N, C) and the new past."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        past = extend(past, Past(split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)))
        q = split_heads(q, self.heads)
        out = attend(q, past.k, past.v, where=self.where, scale=self.scale, backend=self.backend)
        return self.proj(merge_heads(out)), past

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, where={self.where}"
