"""Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention.

arXiv 2603.00175, 2026. Tokens are the nodes of a graph whose edges are positive affinities; attention adds up all
walks over it, W + W^2 + W^3 + ..., each hop discounted by rho. The released operator takes a single hop per layer
and leaves longer walks to depth. What makes the series converge is the norm of the whole matrix: affinities are
divided by their Frobenius norm, not row by row, so a weak token stays weak.

    A = ReLU(q k^T / D)                          (B, H, N, S); the scale is 1 / D, not its root
    W = rho A / (|A|_F + 1e-6)                   rho = sigmoid(rho_logit), 0.95 at the start; |W|_F = rho
    out = (W + W^2 + ... + W^hops) v             (B, H, N, D); hops = None sums for ever: (I - W)^-1 - I

The linear form keeps one importance per key, meant for the principal eigenvector of A: a mean query, weighted by
length, reads the keys, and all tokens get the same sum.

    e_n = |q_n| / sqrt(D),    qbar = sum_n e_n q_n / (sum e + 1e-6)          (B, H, 1, D)
    a_m = ReLU(qbar . k_m / D) / (sum_m ReLU(..) + 1e-6)                     (B, H, S)
    out_n = rho sum_m a_m v_m                                                the same for every n

The equations are those of the released code, which takes one hop; more of them, and rows divided by their sums
instead (`normalise="rows"`, a walk that ends with probability 1 - rho at every step), follow the paper's theory.
The released code reads rho out of the graph, so that it never learns; `official=True` does the same.

|A|_F^2 = sum_n q_n . (A k)_n / D, as relu(l)^2 = relu(l) l: keys ride along as values, and one pass gives both.
"""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import apply, attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.scores.after import Dropout
from foveate.scores.rules import ReLU

EPS = 1e-6

Variant = Literal["pure", "linear"]
Normalise = Literal["matrix", "rows"]


@system(
    key="infinite_self_attention",
    title="Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention",
    arxiv="2603.00175",
    year=2026,
    family="scored",
    role="score",
    cost="O(N^2 C); O(N C) in the linear form",
    fidelity="vectors",
    limits="Weights shrink as 1 / N, so it needs a norm and a residual; the linear form gives all tokens the same.",
)
class InfiniteSelfAttention(nn.Module):
    """Multi-head attention by discounted walks over positive affinities.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        variant: "pure", every pair; or "linear", one importance per key.
        hops: longest walk in the pure form; None for walks of all lengths (solves an N x N system).
        normalise: "matrix" divides affinities by their Frobenius norm, "rows" every row by its sum.
        rho: discount of a hop at the start, between 0 and 1.
        rho_trainable: whether it is a parameter.
        official: read rho as a plain number, so that it gets no gradient, as the released code does.
        dropout: of the weights, in training; every hop draws anew.
        bias: whether the projections have one.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option that does not fit.
    """

    rho_logit: Tensor

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        variant: Variant = "pure",
        hops: int | None = 1,
        normalise: Normalise = "matrix",
        rho: float = 0.95,
        rho_trainable: bool = True,
        official: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        if variant not in ("pure", "linear"):
            raise bad("variant", variant, "'pure' or 'linear'")
        if normalise not in ("matrix", "rows"):
            raise bad("normalise", normalise, "'matrix' or 'rows'")
        if not 0 < rho < 1:
            raise bad("rho", rho, "a number between 0 and 1")
        if not 0 <= dropout < 1:
            raise bad("dropout", dropout, "a probability below 1")
        if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int) or hops < 1):
            raise bad("hops", hops, "a positive number of hops, or None for all")
        if variant == "linear" and (hops != 1 or normalise != "matrix"):
            raise bad("variant", variant, "'pure' beside hops or normalise", "The linear form has neither.")
        if hops is None and dropout:
            raise bad("dropout", dropout, "0 with hops=None", "Its walks share one matrix.")
        self.dim, self.heads, self.variant, self.hops, self.backend = dim, heads, variant, hops, backend
        self.normalise, self.official, self.dropout = normalise, official, dropout
        logit = torch.logit(torch.tensor(float(rho)))
        if rho_trainable:
            self.rho_logit = nn.Parameter(logit)
        else:
            self.register_buffer("rho_logit", logit)
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.v_proj, self.out_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "InfiniteSelfAttention":
        """Return the pure form with one hop, as released.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "every weight is divided by the norm of all of them")
        return cls(dim=dim, heads=heads)

    @property
    def rho(self) -> Float[Tensor, ""]:
        """The discount of a hop."""
        rho = self.rho_logit.sigmoid()
        return rho.detach() if self.official else rho

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.read(x, x, x)

    def read(
        self, query: Float[Tensor, "b n c"], key: Float[Tensor, "b s c"], value: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b n c"]:
        """Let the tokens of `query` read `value` at the keys of `key`.

        Raises:
            ArgumentError: naming an argument that is not (batch, tokens, C), `value`, if it is not as long as
                `key`, or `key`, if it is not as long as `query` although walks have several hops.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[2] != self.dim:
                raise bad(name, tuple(x.shape), f"(batch, tokens, {self.dim})")
        if value.shape[1] != key.shape[1]:
            raise bad("value", tuple(value.shape), f"{key.shape[1]} tokens, as key has")
        q, k = self._heads(query, key)
        v = split_heads(self.v_proj(value), self.heads)
        if self.variant == "linear":
            return self.out_proj(merge_heads(self._pool(q, k, v)))
        if self.hops != 1 and query.shape[1] != key.shape[1]:
            raise bad("key", tuple(key.shape), f"{query.shape[1]} tokens, as query has", "A hop leads back.")
        if self.hops is None:
            return self.out_proj(merge_heads(apply(walks(self._hop(q, k, _unit(k))), v).to(v.dtype)))
        out = self._hop(q, k, v)
        for _ in range(1, self.hops):
            out = self._hop(q, k, v + out)
        return self.out_proj(merge_heads(out))

    def weights(
        self, query: Float[Tensor, "b n c"], key: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b h n s"] | Float[Tensor, "b h s 1"]:
        """Return W of one hop, or rho a as a column in the linear form."""
        q, k = self._heads(query, key)
        if self.variant == "pure":
            return self._hop(q, k, _unit(k))
        return self._pool(q, k, _unit(k))[:, :, :1].mT

    def _heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.q_proj(query), self.heads), split_heads(self.k_proj(key), self.heads)

    def _hop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """W v, in the dtype of v."""
        wide, dtype = accumulation_dtype(q.dtype), v.dtype
        # Sums of many small weights: in half precision the norm would err more than all weights together.
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        if self.normalise == "rows":
            out, norm = self._weigh(q, k, v, torch.ones_like(k[..., :1]))
        else:  # relu(l)^2 = relu(l) l, hence |A|_F^2 = sum_n q_n . (A k)_n / D
            out, read = self._weigh(q, k, v, k)
            square = (q * read).sum((-2, -1), keepdim=True) / q.shape[-1]
            norm = _root(square.clamp_min(0.0))
        return (out * (self.rho / (norm + EPS))).to(dtype)

    def _pool(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The one sum of the linear form, for every query."""
        wide = accumulation_dtype(q.dtype)
        q, k = q.to(wide), k.to(wide)
        energy = torch.linalg.vector_norm(q, dim=-1) * q.shape[-1] ** -0.5
        share = energy / (energy.sum(-1, keepdim=True) + EPS)
        mean = apply(share.unsqueeze(-2), q)
        out, total = self._weigh(mean, k, v.to(wide), torch.ones_like(k[..., :1]))
        return (out * (self.rho / (total + EPS))).to(v.dtype).expand(-1, -1, q.shape[2], -1)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """A v and A `beside`, the first under dropout; one pass where there is none."""
        call = partial(attend, q, k, weigh=ReLU(), scale=1 / q.shape[-1], backend=self.backend)
        if self.training and self.dropout:
            return call(v, after=Dropout(self.dropout)), call(beside)
        out, other = call(torch.cat([v, beside], dim=-1)).split([v.shape[-1], beside.shape[-1]], dim=-1)
        return out, other

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, variant={self.variant!r}, hops={self.hops}"


def walks(w: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return the sum of walks of all lengths, W + W^2 + ... = (I - W)^-1 - I, for a spectral radius below 1.

    With rows that sum to less than 1, adding I gives the fundamental matrix of the absorbing chain: the visits
    to every token before a walk ends. Row and column sums rank tokens by what they reach, and what reaches them.
    """
    wide = w.to(accumulation_dtype(w.dtype))
    unit = torch.eye(w.shape[-1], dtype=wide.dtype, device=w.device)
    return torch.linalg.solve(unit - wide, wide)


def principal(w: Float[Tensor, "*batch n n"], steps: int = 50) -> Float[Tensor, "*batch n"]:
    """Return the principal left eigenvector of a matrix of weights >= 0, of sum 1, by power iteration.

    It says how much of a long walk every key gets, which the linear form's importances stand for.
    """
    x = torch.full_like(w[..., :1, :], 1 / max(w.shape[-1], 1))
    for _ in range(steps):
        x = x @ w
        x = x / x.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return x.squeeze(-2)


def _unit(k: Tensor) -> Float[Tensor, "b h s s"]:
    """Values that make weights come out, one channel per key."""
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return eye.expand(k.shape[0], k.shape[1], -1, -1)


def _root(x: Tensor) -> Tensor:
    """The root, with gradient 0 at 0: where no affinity is positive nothing moves."""
    empty = x == 0
    return x.masked_fill(empty, 1.0).sqrt().masked_fill(empty, 0.0)
