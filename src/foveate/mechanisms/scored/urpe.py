"""Your Transformer May Not be as Powerful as You Expect. arXiv 2205.13401, 2022.

Relative positions inside a softmax cannot say where a token stands: rows sum to one, so that equal tokens give equal
outputs at every position. Universal relative positional encoding (URPE) multiplies the weights after the softmax by a
learned Toeplitz matrix and does not normalise again, which is enough to make positions expressible.

    A = softmax(q k^T / sqrt(D) + B),  B[i, j] = b_(j-i)          (B, H, N, N)
    out = (A * C) v,                   C[i, j] = c_(j-i)          per head; nothing normalises A * C

Both tables are per head and shared by all layers of a model. Near offsets have an entry of their own, far ones share
entries that grow with the logarithm of the distance; or every offset up to a length has its own. C starts as ones here,
that is, as plain relative attention; the authors also start it near zero, as every other embedding.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.basic import Causal
from foveate.scores.after import After, Multiply
from foveate.scores.base import Score
from foveate.scores.buckets import Buckets, BucketTable, SignedBuckets

Terms = tuple[Score | None, After | None]
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class UniversalPosition(nn.Module):
    """The two tables: what is added to logits, and what multiplies weights.

    Args:
        heads: number of heads.
        bias: which row of the table b an offset reads; None for no bias.
        factor: which row of the table c an offset reads; None for no factor (plain relative attention).
        constant: whether c starts as ones; otherwise as b does, from a normal distribution of deviation 0.02.
    """

    def __init__(self, heads: int, bias: Buckets | None, factor: Buckets | None, *, constant: bool = True):
        super().__init__()
        self.heads, self.constant = heads, constant
        self.bias_buckets, self.factor_buckets = bias, factor
        self.bias = None if bias is None else nn.Parameter(torch.empty(heads, bias.rows))
        self.factor = None if factor is None else nn.Parameter(torch.empty(heads, factor.rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published."""
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.02)
        if self.factor is not None:
            nn.init.ones_(self.factor) if self.constant else nn.init.normal_(self.factor, std=0.02)

    def forward(self) -> Terms:
        """Return the score and the after-value for `attend`."""
        score = after = None
        if self.bias is not None and self.bias_buckets is not None:
            score = BucketTable(self.bias, self.bias_buckets)
        if self.factor is not None and self.factor_buckets is not None:
            after = Multiply(BucketTable(self.factor, self.factor_buckets))
        return score, after

    def extra_repr(self) -> str:
        """Show the options."""
        return f"heads={self.heads}, bias={self.bias_buckets}, factor={self.factor_buckets}"


@system(
    key="urpe",
    title="Your Transformer May Not be as Powerful as You Expect",
    arxiv="2205.13401",
    year=2022,
    family="scored",
    role="score",
    cost="O(N^2 C)",
    fidelity="vectors",
    causal="optional",
    dims=(1,),
    limits="Factors after the softmax need the weights themselves: fast kernels that never store them cannot serve it.",
)
class UniversalRelativeAttention(Decodes, nn.Module):
    """Attention with relative biases before and Toeplitz factors after the softmax.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        bias: rows of the bias table by offset, `SignedBuckets()` by default.
        factor: rows of the factor table by offset, `SignedBuckets()` by default.
        constant: whether factors start as ones.
        tables: whether the layer owns the tables; otherwise `forward` is handed those of the model.
        causal: whether a token sees only itself and what comes before.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        bias: Buckets | None = None,
        factor: Buckets | None = None,
        constant: bool = True,
        tables: bool = True,
        causal: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.causal, self.backend = dim, heads, causal, backend
        self.qkv = QKV(dim, heads)
        self.proj = nn.Linear(dim, dim)
        self.position = None
        if tables:
            self.position = UniversalPosition(
                heads, bias or SignedBuckets(), factor or SignedBuckets(), constant=constant
            )

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "UniversalRelativeAttention":
        """Return a layer with the published buckets.

        Raises:
            ArgumentError: naming `grid` when it is not a sequence.
        """
        if grid.ndim != 1:
            raise bad("grid", grid, "a grid with 1 axis", "Offsets are counted along a sequence.")
        return cls(dim=dim, heads=heads, causal=causal)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        *,
        position: Terms | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a sequence.

        Args:
            x: tokens.
            grid: their geometry, one axis.
            position: the score and the after-value of the model, where the layer owns no tables.
            mask: as in `attend`.

        Raises:
            ArgumentError: naming `x`, `grid` or `position`.
        """
        check_tokens(x, grid, self.dim, (1,))
        q, k, v = self.qkv(x)
        return self._mix(q, k, v, position, mask)

    def prefill(
        self, x: Float[Tensor, "b n c"], past: Past | None = None
    ) -> tuple[Float[Tensor, "b n c"], Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Raises:
            ArgumentError: naming `past`, or `causal` where later tokens would be needed.
        """
        if not self.causal:
            raise bad("causal", self.causal, "True to decode", "Earlier tokens would see the new one.")
        q, k, v = self.qkv(x)
        past = extend(past, Past(k, v))
        return self._mix(q, past.k, past.v, None, None), past

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, position: Terms | None, mask: Tensor | None) -> Tensor:
        if (position is None) == (self.position is None):
            expected = (
                "None: the layer has tables" if self.position is not None else "the tables of the model"
            )
            raise bad("position", position, expected)
        score, after = position if position is not None else self.position()  # type: ignore[misc]
        where = Causal() if self.causal else None
        out = attend(q, k, v, where=where, score=score, after=after, mask=mask, backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, causal={self.causal}, tables={self.position is not None}"


class UniversalLayer(nn.Module):
    """A post-norm layer: attention, then two linear maps over channels."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str, backend: str):
        super().__init__()
        self.attention = UniversalRelativeAttention(dim=dim, heads=heads, tables=False, backend=backend)
        self.attention_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), _ACTIVATIONS[activation](), nn.Linear(hidden, dim))
        self.mlp_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, position: Terms, mask: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        """Return the layer's output."""
        x = self.attention_norm(x + self.attention(x, grid, position=position, mask=mask))
        return self.mlp_norm(x + self.mlp(x))


class UniversalEncoder(nn.Module):
    """The authors' sentence encoder: embeddings without positions, and layers that share two tables.

    Args:
        vocab: number of different tokens.
        dim: channels C.
        heads: number of heads.
        depth: number of layers.
        hidden: channels inside the MLPs.
        padding: id of the padding token, None for none.
        bias, factor: rows of the tables by offset; None for no such table.
        constant: whether factors start as ones.
        embedding_norm: whether embeddings are normed.
        activation: "gelu" or "relu".
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        heads: int,
        depth: int,
        hidden: int,
        padding: int | None = None,
        bias: Buckets | None,
        factor: Buckets | None,
        constant: bool = True,
        embedding_norm: bool = False,
        activation: str = "gelu",
        backend: str = "auto",
    ):
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise bad("activation", activation, f"one of {tuple(_ACTIVATIONS)}")
        self.padding = padding
        self.embed = nn.Embedding(vocab, dim, padding_idx=padding)
        self.norm = nn.LayerNorm(dim) if embedding_norm else nn.Identity()
        self.position = UniversalPosition(heads, bias, factor, constant=constant)
        self.layers = nn.ModuleList(
            UniversalLayer(dim, heads, hidden, activation, backend) for _ in range(depth)
        )

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Return the last states; padding is seen by nobody, its own states mean nothing."""
        x = self.norm(self.embed(tokens))
        present: Bool[Tensor, "b n"] | None = None if self.padding is None else tokens != self.padding
        mask = None
        if present is not None:
            x = x * present.unsqueeze(-1).to(x.dtype)
            mask = present[:, None, None]
        position, grid = self.position(), Grid(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, grid, position, mask)
        return x
