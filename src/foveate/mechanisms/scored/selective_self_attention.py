"""Selective Attention: Enhancing Transformer through Principled Context Control. arXiv 2411.12892, 2024.

Selective self-attention (SSA) gives every query an inverse temperature of its own, so that how sharply a token looks
is learned apart from what it looks for. The temperature has a part that depends on the token and one that grows with
the logarithm of its position, against the dilution of attention over long contexts. Values are scaled likewise, which
lets a token withdraw from everybody's output. With n the number of keys a query sees (its position counted from 1):

    tau_q = tanh(w_q . gelu(q)) + 1 + a log n                  (B, H, N), one scalar per head and query
    tau_v = tanh(w_v . gelu(v)) + 1                            (B, H_kv, N)
    out   = softmax(tau_q (q k^T / sqrt(D)) + causal) (tau_v v)     (B, H, N, D), then W_o
    a     = exp(-exp(beta)), or sigmoid(beta), or beta         one scalar per layer

Only w_q, w_v (one vector of D numbers per head) and beta are new: the projections of the layer are shared, which is
how the overhead stays below 0.5 %. The authors' code has the position part alone, with a = exp(-exp(beta)) and beta
= 2 at the start (a = 6e-4, a fine-tuned model starts almost unchanged), and without the outer functions a = beta =
1e-5. The token parts follow the paper's text; that they start at 0 and see q before its rotation is our reading, as
is n = N, the number of visible keys, where attention is not causal. n is the absolute position in decoding too; the
authors' code counts the rows of one call. Not the "selective attention" of arXiv 2410.02703, which masks tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend, length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.pattern import check_int
from foveate.scores.rotary import rotary
from foveate.scores.temperature import RowFactor

Position = Literal["double_exp", "sigmoid", "linear", "none"]
# All start as good as unchanged. The sigmoid's start is ours: that of the double exponential.
_STARTS = {"double_exp": 2.0, "sigmoid": -(math.e**2), "linear": 1e-5}


class TokenTemperature(nn.Module):
    """tanh(w . gelu(x)) per head and token: what a token adds to its temperature, between -1 and 1.

    Args:
        heads: number of heads.
        width: channels of a head.
    """

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        """Return one number per head and token; 0 everywhere before training."""
        return torch.tanh((functional.gelu(x) * self.weight).sum(-1))


class PositionTemperature(nn.Module):
    """1 + a log n, with a learned scalar behind a.

    Args:
        form: "double_exp" for a = exp(-exp(beta)), "sigmoid", "linear" for a = beta.
    """

    def __init__(self, form: Position):
        super().__init__()
        if form not in _STARTS:
            raise bad("position", form, f"one of {(*_STARTS, 'none')}")
        self.form = form
        self.beta = nn.Parameter(torch.tensor(_STARTS[form]))

    def forward(self, seen: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Return the factor of queries that see so many keys; 1 where it is one."""
        rate = self.beta.to(seen.dtype)
        if self.form == "double_exp":
            rate = torch.exp(-torch.exp(rate))
        elif self.form == "sigmoid":
            rate = torch.sigmoid(rate)
        return 1 + rate * torch.log(seen)

    def extra_repr(self) -> str:
        """Show the form."""
        return f"form={self.form!r}"


@system(
    key="selective_self_attention",
    title="Selective Attention: Enhancing Transformer through Principled Context Control",
    arxiv="2411.12892",
    year=2024,
    family="scored",
    role="score",
    cost="O(N^2 C)",
    fidelity="vectors",
    causal="optional",
    limits="As many pairs as full attention: temperatures change how sharp it is, not what it costs. The authors' "
    "vectors cover the position part; the token part follows the paper's text.",
)
class SelectiveSelfAttention(Decodes, nn.Module):
    """Multi-head attention with a temperature per query and a scale per value.

    Args:
        dim: channels C.
        heads: number of heads H.
        kv_heads: key heads, which divide `heads`; as many as heads by default.
        width: channels of a head; dim / heads by default.
        causal: whether token i sees only tokens 0..i.
        tokens: which of "q" and "v" have a token temperature.
        position: "double_exp", "sigmoid", "linear", see `PositionTemperature`; "none" for no position part.
        rotary_dims: channels of each head that are rotated (half-split), 0 for none.
        base: of the rotary embedding.
        bias: whether the projections have one.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        width: int | None = None,
        causal: bool = True,
        tokens: Sequence[str] = ("q", "v"),
        position: Position = "double_exp",
        rotary_dims: int = 0,
        base: float = 10000.0,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads) if width is None else check_int(width, "width", 1)
        kv_heads = heads if kv_heads is None else check_int(kv_heads, "kv_heads", 1)
        if heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        if isinstance(tokens, str) or set(tokens) - {"q", "v"}:
            raise bad("tokens", tokens, "a sequence of 'q' and 'v', or an empty one")
        if rotary_dims % 2 or not 0 <= rotary_dims <= width:
            raise bad("rotary_dims", rotary_dims, f"an even number of channels, at most {width}")
        self.dim, self.heads, self.kv_heads, self.causal = dim, heads, kv_heads, causal
        self.rotary_dims, self.base, self.backend = rotary_dims, base, backend
        self.q_proj = nn.Linear(dim, heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.q_temperature = TokenTemperature(heads, width) if "q" in tokens else None
        self.v_temperature = TokenTemperature(kv_heads, width) if "v" in tokens else None
        self.position = None if position == "none" else PositionTemperature(position)
        self.proj = nn.Linear(heads * width, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "SelectiveSelfAttention":
        """Return the layer with both temperatures; rotary positions on sequences, as in the models of the paper."""
        width = check_heads(dim, heads)
        return cls(dim=dim, heads=heads, causal=causal, rotary_dims=width // 2 * 2 if grid.ndim == 1 else 0)

    def query_factor(self, q: Float[Tensor, "b h n d"], before: int, n_k: int) -> Float[Tensor, "b h n"]:
        """Return tau_q of queries before their rotation.

        Args:
            q: queries at positions before, before + 1, ...
            before: tokens before the first query.
            n_k: keys there are, which all queries see where attention is not causal.
        """
        dtype, n = accumulation_dtype(q.dtype), q.shape[2]
        factor = torch.ones(1, 1, n, dtype=dtype, device=q.device)
        if self.position is not None:
            seen = torch.arange(before + 1, before + n + 1, dtype=dtype, device=q.device)
            factor = self.position(seen if self.causal else torch.full_like(seen, n_k)).reshape(1, 1, n)
        return factor if self.q_temperature is None else factor + self.q_temperature(q).to(dtype)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self._mix(x, None)[0]

    def prefill(
        self, x: Float[Tensor, "b n c"], past: Past | None = None
    ) -> tuple[Float[Tensor, "b n c"], Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Raises:
            ArgumentError: naming `causal` or `past`.
        """
        if not self.causal:
            raise bad("causal", False, "True for decoding", "Later tokens would change what came before.")
        return self._mix(x, past)

    def _mix(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        before, n = length(past), x.shape[1]
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        score = None
        if self.position is not None or self.q_temperature is not None:
            score = RowFactor(self.query_factor(q, before, before + n))
        if self.v_temperature is not None:
            v = v * (1 + self.v_temperature(v)).unsqueeze(-1)
        if self.rotary_dims:
            at = torch.arange(before, before + n, device=x.device)
            q, k = (rotary(t, at, base=self.base, dims=self.rotary_dims) for t in (q, k))
        past = extend(past, Past(k, v))
        where = Causal(align="end") if self.causal else None
        out = attend(q, past.k, past.v, where=where, score=score, backend=self.backend)
        return self.proj(merge_heads(out)), past

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, "
            f"rotary_dims={self.rotary_dims}"
        )
