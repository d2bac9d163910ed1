"""Theory, Analysis, and Best Practices for Sigmoid Self-Attention. arXiv 2409.04431, 2024.

The softmax of every row is replaced by an element-wise sigmoid with a constant bias b = -log(n), which keeps
the mass of a row of n keys near 1 at the start. Keys no longer compete: one key changes one column of the
weights, rows can be computed in pieces that simply add up, and a row without keys gives zeros.

    L = q k^T / sqrt(D)                     (B, H, N, N), after q/k norm and rotary positions where asked for
    A = sigmoid((L + position) exp(t) + b) r_i,       r_i = 1, 1 / sqrt(i + 1) or 1 / (i + 1)
    out = A v                               (B, H, N, D)

The published recipe for vision adds LayerScale (1e-4) around the layer, language models with RoPE or ALiBi
use b = -log(n) of the training length, and large ones normalise the layer's output once more.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.scores.after import Multiply
from foveate.scores.base import Score
from foveate.scores.distance import ALiBi, alibi_slopes
from foveate.scores.rotary import rotary
from foveate.scores.rules import Sigmoid, Softmax
from foveate.scores.temperature import RowFactor

RowScale = Literal["none", "sqrt", "length"]
Position = Literal["none", "alibi", "rope"]
_POWERS = {"none": 0.0, "sqrt": -0.5, "length": -1.0}


class _SigmoidWeights(nn.Module):
    """What self- and cross-attention share: the rule, its two constants, and the weights as a map.

    Args:
        logit_bias: b, added after the temperature.
        temperature: t, logits are multiplied by exp(t).
        activation: "sigmoid", or "softmax" for the baseline with everything else equal.
        row_scale: r_i; "sqrt" and "length" are the causal length normalisations.
    """

    attn_bias: Tensor
    attn_temp: Tensor

    def __init__(self, *, logit_bias: float, temperature: float, activation: str, row_scale: RowScale):
        super().__init__()
        if activation not in ("sigmoid", "softmax"):
            raise bad("activation", activation, "'sigmoid' or 'softmax'")
        if row_scale not in _POWERS:
            raise bad("row_scale", row_scale, f"one of {tuple(_POWERS)}")
        self.activation, self.row_scale = activation, row_scale
        # Buffers, as published: constants of the training run that travel with the weights.
        self.register_buffer("attn_bias", torch.full((1,), float(logit_bias)))
        self.register_buffer("attn_temp", torch.full((1,), float(temperature)))

    def forward(self, q, k, v, *, where=None, position=(), mask=None, backend="auto"):
        """Attend with this rule; arguments as in `attend`, `position` a tuple of scores."""
        scores: tuple[Score, ...] = (*position, RowFactor(self.attn_temp.exp().reshape(1, 1, 1)))
        after = None
        if self.row_scale != "none":
            rows = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=torch.float32)
            after = Multiply(rows.pow(_POWERS[self.row_scale]).unsqueeze(1))
        # A constant bias does not change a softmax.
        rule = Sigmoid(self.attn_bias) if self.activation == "sigmoid" else Softmax()
        return attend(q, k, v, where=where, score=scores, weigh=rule, after=after, mask=mask, backend=backend)


@system(
    key="sigmoid_attention",
    title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    arxiv="2409.04431",
    year=2024,
    family="scored",
    role="score",
    cost="O(N^2 C)",
    fidelity="vectors",
    causal="optional",
    limits="Needs b = -log(n) of the training length; without it outputs grow with N and training fails.",
)
class SigmoidAttention(nn.Module):
    """Multi-head self-attention with element-wise sigmoid weights.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        length: tokens n seen in training; sets the logit bias to -log(n). Give this or `logit_bias`.
        logit_bias: b itself; 0 when neither is given.
        temperature: t, logits are multiplied by exp(t).
        causal: whether token i sees only tokens 0..i.
        position: "none", "alibi" (slope * (j - i), meant for causal use) or "rope" (interleaved pairs).
        qk_norm: LayerNorm over the head width on q and k.
        qkv_bias: whether the projections (q, k, v and output) have a bias.
        activation: "sigmoid", or "softmax" with everything else equal.
        row_scale: "none", "sqrt" or "length": weights of row i times 1, (i + 1)^-1/2 or (i + 1)^-1.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option, e.g. `length` beside `logit_bias`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        length: int | None = None,
        logit_bias: float | None = None,
        temperature: float = 0.0,
        causal: bool = False,
        position: Position = "none",
        qk_norm: bool = False,
        qkv_bias: bool = False,
        activation: str = "sigmoid",
        row_scale: RowScale = "none",
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        if length is not None and (logit_bias is not None or length < 1):
            raise bad("length", length, "a positive number of tokens, and no logit_bias beside it")
        if position not in ("none", "alibi", "rope"):
            raise bad("position", position, "'none', 'alibi' or 'rope'")
        if position == "rope" and width % 2:
            raise bad("heads", heads, f"heads of even width for rope, not {width}")
        bias = -math.log(length) if length is not None else logit_bias or 0.0
        self.dim, self.heads, self.causal, self.position, self.backend = dim, heads, causal, position, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.weigh = _SigmoidWeights(
            logit_bias=bias, temperature=temperature, activation=activation, row_scale=row_scale
        )
        self.proj = nn.Linear(dim, dim, bias=qkv_bias)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "SigmoidAttention":
        """Return the layer with b = -log(n) for the grid's n tokens, and q/k norm as the paper advises."""
        return cls(dim=dim, heads=heads, length=grid.numel, causal=causal, qk_norm=True, qkv_bias=True)

    def _mix(self, x: Tensor, values: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = self.q_norm(q), self.k_norm(k)
        scores: tuple[Score, ...] = ()
        if self.position == "rope":
            q, k = rotary(q, style="interleaved"), rotary(k, style="interleaved")
        elif self.position == "alibi":
            scores = (ALiBi(alibi_slopes(self.heads).to(x.device), signed=True),)
        where = Causal() if self.causal else None
        values = v if values is None else values
        return self.weigh(q, k, values, where=where, position=scores, mask=mask, backend=self.backend)

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid | None = None, *, mask: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens.

        Args:
            x: tokens.
            grid: their geometry; positions are taken along the flattened order. May be left out.
            mask: as in `attend`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        if grid is None and x.dim() == 3 and x.shape[1]:
            grid = Grid(x.shape[1])
        check_tokens(x, grid, self.dim)
        return self.proj(merge_heads(self._mix(x, None, mask)))

    def attention_map(
        self, x: Float[Tensor, "b n c"], *, mask: Tensor | None = None
    ) -> Float[Tensor, "b h n n"]:
        """Return the weights A, N x N of them per head."""
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return self._mix(x, identity.expand(x.shape[0], self.heads, -1, -1), mask)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, causal={self.causal}, position={self.position!r}"


class SigmoidCrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another; values pass a LayerNorm, as published.

    Args:
        dim: channels of the queries and of the output.
        heads: number of heads; must divide `dim`.
        kv_dim: channels of the keys' sequence, `dim` by default; must be a multiple of `heads`.
        logit_bias, temperature, qk_norm, qkv_bias, activation, row_scale, backend: as in `SigmoidAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_dim: int | None = None,
        logit_bias: float = 0.0,
        temperature: float = 0.0,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        activation: str = "sigmoid",
        row_scale: RowScale = "none",
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        kv_dim = dim if kv_dim is None else kv_dim
        if kv_dim != dim:
            check_heads(kv_dim, heads)
        self.dim, self.kv_dim, self.heads, self.backend = dim, kv_dim, heads, backend
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_proj = nn.Linear(kv_dim, 2 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.v_norm = nn.LayerNorm(width)
        self.weigh = _SigmoidWeights(
            logit_bias=logit_bias, temperature=temperature, activation=activation, row_scale=row_scale
        )
        self.proj = nn.Linear(dim, dim, bias=qkv_bias)

    def _mix(self, x: Tensor, context: Tensor, mask: Tensor | None, identity: bool) -> Tensor:
        for name, value, width in (("x", x, self.dim), ("context", context, self.kv_dim)):
            if value.dim() != 3 or value.shape[2] != width:
                raise bad(name, tuple(value.shape), f"(batch, tokens, {width})")
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k, v = (split_heads(part, self.heads) for part in self.kv_proj(context).chunk(2, dim=-1))
        k, v = self.k_norm(k), self.v_norm(v)
        if identity:
            v = torch.eye(context.shape[1], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        return self.weigh(q, k, v, mask=mask, backend=self.backend)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"], *, mask: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """Let the tokens of `x` read from `context`.

        Raises:
            ArgumentError: naming `x` or `context`.
        """
        return self.proj(merge_heads(self._mix(x, context, mask, identity=False)))

    def attention_map(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"], *, mask: Tensor | None = None
    ) -> Float[Tensor, "b h n m"]:
        """Return the weights A."""
        return self._mix(x, context, mask, identity=True)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, kv_dim={self.kv_dim}"
