"""Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level.
arXiv 2403.04690, 2024.

Each token of a 1-, 2- or 3-d grid attends to the window of tokens nearest to it: a sliding window that is
moved inside at the borders, so that every token has exactly prod(window) keys. Per axis the window may be
dilated or causal. The paper's contribution is to compute it like a fused dense attention, tile by tile,
visiting only the key tiles that meet the windows of a query tile; here that is what lowering the
`Neighborhood` pattern gives.

    q, k, v  (B, H, N, D), N = prod(grid);  A(i) = keys of token i, a product over axes
    out_i    = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D)) v_j
    along an axis of length L:  A(i) = { s, s+1, ..., s+K-1 },  s = clamp(i - K//2, 0, L - K)

Additional keys, seen by every token, take part in the same softmax: a second bank of keys.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.banks import Bank, attend_banks
from foveate.mechanisms.inputs import check_tokens, frozen
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.grids import Neighborhood

PerAxis = int | Sequence[int]
# Window per axis for 1-, 2- and 3-d grids when nobody says otherwise: 49 to 125 keys a token, as published.
WINDOWS = {1: 63, 2: 7, 3: 5}


def neighborhood_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    where: Neighborhood,
    *,
    additional_keys: Float[Tensor, "b hk s d"] | None = None,
    additional_values: Float[Tensor, "b hk s dv"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
):
    """Attend inside neighbourhoods, and to additional keys that every token sees.

    Args:
        q, k, v: tokens in row-major order of `where.grid`; fewer key heads than query heads are repeated.
        where: the neighbourhood of each token.
        additional_keys, additional_values: S further keys and values without a place on the grid.
        scale: of the logits; 1 / sqrt(D) when None.
        backend: of `attend`.
        return_lse: also return the log-sum-exp of each row of logits, (B, H, N).

    Returns:
        (B, H, N, Dv), or the pair (out, lse).

    Raises:
        ArgumentError: naming `additional_values` when only one of the two is given, or what `attend` refuses.
    """
    if (additional_keys is None) != (additional_values is None):
        raise bad("additional_values", additional_values, "to be given together with additional_keys")
    if additional_keys is None or additional_values is None:
        return attend(q, k, v, where=where, scale=scale, backend=backend, return_lse=return_lse)
    banks = [Bank(k, v, where=where), Bank(additional_keys, additional_values)]
    return attend_banks(q, banks, scale=scale, backend=backend, return_lse=return_lse)


@system(
    key="fused_neighborhood_attention",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention "
    "at the Threadblock Level",
    arxiv="2403.04690",
    year=2024,
    family="local",
    role="pattern",
    cost="O(N K C), K = prod(window)",
    fidelity="vectors",
    causal="optional",
    sizes="every axis at least window * dilation",
)
class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention over tokens of a grid.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        window: keys per axis; an integer serves grids of any number of axes.
        dilation: distance between neighbouring keys, per axis.
        causal: per axis, whether keys after the query are left out. All axes causal is causal in token order.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: PerAxis = 7,
        dilation: PerAxis = 1,
        causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.dim, self.heads, self.scale, self.backend = dim, heads, scale, backend
        self.window, self.dilation, self.causal = frozen(window), frozen(dilation), frozen(causal)
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "NeighborhoodAttention":
        """Return the published window (7 x 7 on images), cut to the axes of `grid`."""
        window = tuple(min(WINDOWS[grid.ndim], size) for size in grid)
        return cls(dim=dim, heads=heads, window=window, causal=causal)

    def where(self, grid: Grid) -> Neighborhood:
        """Return the pattern on `grid`.

        Raises:
            ArgumentError: naming `window`, `dilation` or `causal` when it does not fit the grid.
        """
        return Neighborhood(grid, self.window, self.dilation, 1, self.causal)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x`, `grid`, or the option that does not fit the grid.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        out = attend(q, k, v, where=self.where(grid), scale=self.scale, backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, window={self.window}, "
            f"dilation={self.dilation}, causal={self.causal}"
        )
