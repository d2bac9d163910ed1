"""Attention Is All You Need. arXiv 1706.03762, 2017.

Every token attends to every token (or, causal, to every earlier one and itself). The baseline of all
comparisons: exact, quadratic in the number of tokens, and served by the fastest dense kernels there are.

    q, k, v = x W_q, x W_k, x W_v                      (B, H, N, D) each, D = C / H
    out     = softmax(q k^T / sqrt(D)) v  W_o          (B, N, C)
"""

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_tokens
from foveate.mechanisms.past import Decodes, Past, extend
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.basic import Causal


@system(
    key="full_attention",
    title="Attention Is All You Need",
    arxiv="1706.03762",
    year=2017,
    family="baseline",
    role="module",
    cost="O(N^2 C)",
    fidelity="paper",
    causal="optional",
)
class FullAttention(Decodes, nn.Module):
    """Dense multi-head self-attention.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        causal: whether token i sees only tokens 0..i (row-major order on a grid).
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.
    """

    def __init__(
        self, *, dim: int, heads: int, causal: bool = False, qkv_bias: bool = True, backend: str = "auto"
    ):
        super().__init__()
        self.dim, self.heads, self.causal, self.backend = dim, heads, causal, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "FullAttention":
        """Return the baseline; it takes every grid."""
        return cls(dim=dim, heads=heads, causal=causal)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        where = Causal() if self.causal else None
        return self.proj(merge_heads(attend(q, k, v, where=where, backend=self.backend)))

    def prefill(self, x: Float[Tensor, "b n c"], past: Past | None = None) -> tuple[Tensor, Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Raises:
            ArgumentError: naming `causal` when the module is not.
        """
        if not self.causal:
            raise bad("causal", False, "True to decode", "Build the module with causal=True.")
        q, k, v = self.qkv(x)
        past = extend(past, Past(k, v))
        out = attend(q, *past, where=Causal(align="end"), backend=self.backend)
        return self.proj(merge_heads(out)), past

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, causal={self.causal}"
