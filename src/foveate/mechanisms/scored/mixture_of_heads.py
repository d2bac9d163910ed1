"""MoH: Multi-Head Attention as Mixture-of-Head Attention. arXiv 2410.11842, 2024.

Heads are experts: some are shared by all tokens, of the others every token takes the few its router likes best, and
what comes out of each head is multiplied by a gate. With h_s shared heads, E = H - h_s others of which k are taken,
o_h the output of head h of ordinary attention, and all W without bias:

    g = softmax(W_g x)                                    (B, N, E)
    r = k g / sum of the k largest g, 0 at the others     (B, N, E)
    s = h_s softmax(W_1 x)                                (B, N, h_s); 1 where h_s = 1
    a = 2 softmax(W_0 x)                                  (B, N, 2); 1 where all heads are of one kind
    y = W_o concat(a_1 s_h o_h, a_2 r_h o_h)              (B, N, C)
    loss = E^2 mean_h(mean g_h  mean [h taken])           k when all heads are used alike

The authors compute every head and multiply most by zero. Here a head that a token did not take is not computed for
it: its query is left out, keys and values stay. Gradients are the same, as the choice of the k largest has none.

`NormRoutedHeads` is the form for pretrained language models: no router, a token takes the heads whose queries are
longest; gates are 1 or 0. The released code has its inference; in training the gate is 1 with the gradient of
softmax(|q_h| / std), straight through, which needs all heads (our reading of the paper). `MixtureOfCosineHeads` and
`MixtureOfAggregatedHeads` are the ones in TransNeXt (`mechanisms/aggregated.py`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.aggregated import AggregatedAttention, CosineAttention
from foveate.mechanisms.auxiliary import with_loss
from foveate.mechanisms.head_router import Gates, HeadRouter, attend_chosen, check_routing, gated
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend, length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.pattern import check_int
from foveate.scores.rotary import rotary


@system(
    key="mixture_of_heads",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    year=2024,
    family="scored",
    role="router",
    cost="O(N^2 C (h_s + k) / H)",
    fidelity="vectors",
    causal="optional",
    limits="Keys and values of all heads are made for all tokens. Causal cells need a mask per tile and keep gaps "
    "where a head was not taken: fewer pairs, but time is saved only below about three quarters of the heads.",
)
class MixtureOfHeads(nn.Module):
    """Multi-head attention in which every token takes some of the heads.

    Args:
        dim: channels C.
        heads: number of heads H.
        shared: h_s, heads that all tokens use.
        routed: k, heads a token takes of the others.
        width: channels of a head; dim / heads by default.
        causal: whether token i sees only tokens 0..i.
        qkv_bias: whether the q, k, v projections have a bias.
        qk_norm: LayerNorm over the head width on q and k.
        loss_weight: of the load-balancing loss, which rides along with the output in training. The authors average
            it over the layers of a model with weight 0.01: divide by their number.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        shared: int,
        routed: int,
        width: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        loss_weight: float = 0.01,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads) if width is None else check_int(width, "width", 1)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.loss_weight, self.backend = loss_weight, backend
        self.qkv = nn.Linear(dim, 3 * heads * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.router = HeadRouter(dim, heads, shared=shared, routed=routed)
        self.proj = nn.Linear(heads * width, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "MixtureOfHeads":
        """Return the layer with three quarters of the heads per token, a quarter of all heads shared."""
        check_heads(dim, heads)
        shared = heads // 4 if heads > 1 else 1
        return cls(
            dim=dim,
            heads=heads,
            shared=shared,
            routed=3 * heads // 4 - shared if heads > 1 else 0,
            causal=causal,
        )

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        gates = self.router(x)
        out = attend_chosen(
            self.q_norm(q), self.k_norm(k), v, gates.chosen, where=Causal() if self.causal else None,
            backend=self.backend,
        )  # fmt: skip
        out = self.proj(merge_heads(gated(out, gates.gates)))
        return _balanced(self, out, gates)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, causal={self.causal}, loss_weight={self.loss_weight}"


def _balanced(module: nn.Module, out: Tensor, gates: Gates) -> Tensor:
    """Let the load-balancing loss ride along, in training."""
    weight = module.loss_weight
    return with_loss(out, weight * gates.balance) if module.training and weight else out  # type: ignore


class NormRoutedHeads(Decodes, nn.Module):
    """Causal attention, with rotary positions, in which a token takes the heads with the longest queries.

    Args:
        dim: channels C.
        heads: number of heads H.
        kv_heads: key heads, which divide `heads`; as many as heads by default.
        shared: heads that all tokens use; half of them by default.
        routed: heads a token takes of the others; half of these by default.
        width: channels of a head, an even number; dim / heads by default.
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
        shared: int | None = None,
        routed: int | None = None,
        width: int | None = None,
        base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads) if width is None else check_int(width, "width", 1)
        if width % 2:
            raise bad("width", width, "an even number of channels, which are rotated in pairs")
        kv_heads = heads if kv_heads is None else check_int(kv_heads, "kv_heads", 1)
        if heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        shared = heads // 2 if shared is None else shared
        routed = (heads - shared + 1) // 2 if routed is None else routed
        check_routing(heads, shared, routed)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.shared, self.routed, self.base, self.backend = shared, routed, base, backend
        self.q_proj = nn.Linear(dim, heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.proj = nn.Linear(heads * width, dim, bias=bias)

    def choose(self, q: Float[Tensor, "b h n d"]) -> tuple[Bool[Tensor, "b n e"], Float[Tensor, "b n e"]]:
        """Return which of the routed heads every token takes, by queries before their rotation, and the scores."""
        norms = q[:, self.shared :].norm(dim=-1).transpose(1, 2)
        if norms.shape[2] > 1:
            norms = norms / norms.std(-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
        scores = norms.softmax(-1)
        best = scores.topk(self.routed, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True), scores

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(
        self, x: Float[Tensor, "b n c"], past: Past | None = None
    ) -> tuple[Float[Tensor, "b n c"], Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too."""
        at = torch.arange(x.shape[1], device=x.device) + length(past)
        q = split_heads(self.q_proj(x), self.heads)
        k, v = (split_heads(p(x), self.kv_heads) for p in (self.k_proj, self.v_proj))
        chosen, scores = self.choose(q)
        q, k = rotary(q, at, base=self.base), rotary(k, at, base=self.base)
        past = extend(past, Past(k, v))
        where = Causal(align="end")
        if self.training:
            hard = chosen.to(scores.dtype) + (scores - scores.detach())
            every = hard.new_ones(*hard.shape[:2], self.shared)
            out = attend(q, past.k, past.v, where=where, backend=self.backend)
            out = gated(out, torch.cat([every, hard], dim=-1))
        else:
            out = attend_chosen(q, past.k, past.v, chosen, where=where, backend=self.backend)
        return self.proj(merge_heads(out)), past

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, shared={self.shared}, routed={self.routed}"


class MixtureOfCosineHeads(CosineAttention):
    """`CosineAttention` in which every token takes some of the heads.

    Args:
        dim: channels C.
        heads: number of heads H.
        shared: heads that all tokens use.
        routed: heads a token takes of the others.
        qkv_bias: whether the q, k, v projections have a bias.
        loss_weight: as in `MixtureOfHeads`.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        shared: int,
        routed: int,
        qkv_bias: bool = True,
        loss_weight: float = 0.01,
        backend: str = "auto",
    ):
        super().__init__(dim=dim, heads=heads, qkv_bias=qkv_bias, backend=backend)
        self.router, self.loss_weight = HeadRouter(dim, heads, shared=shared, routed=routed), loss_weight

    def forward(self, x, grid, *, positions=None) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`; arguments as in `CosineAttention`."""
        check_tokens(x, grid, self.dim, (2,))
        gates = self.router(x)
        out = gated(self.mix(x, grid, positions, gates.chosen), gates.gates)
        return _balanced(self, self.proj(merge_heads(out)), gates)


class MixtureOfAggregatedHeads(AggregatedAttention):
    """`AggregatedAttention` in which every token takes some of the heads.

    Args:
        dim: channels C.
        heads: number of heads H.
        shared: heads that all tokens use.
        routed: heads a token takes of the others.
        window: side of the local window, odd.
        pool: tokens per pooled one along each axis, or a Grid of pooled ones.
        qkv_bias: whether the q, k, v projections have a bias.
        loss_weight: as in `MixtureOfHeads`.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        shared: int,
        routed: int,
        window: int = 3,
        pool: int | Grid = 8,
        qkv_bias: bool = True,
        loss_weight: float = 0.01,
        backend: str = "auto",
    ):
        super().__init__(dim=dim, heads=heads, window=window, pool=pool, qkv_bias=qkv_bias, backend=backend)
        self.router, self.loss_weight = HeadRouter(dim, heads, shared=shared, routed=routed), loss_weight

    def forward(self, x, grid, *, positions=None) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`; arguments as in `AggregatedAttention`."""
        check_tokens(x, grid, self.dim, (2,))
        gates = self.router(x)
        out = gated(self.mix(x, grid, positions, gates.chosen), gates.gates)
        return _balanced(self, self.proj(merge_heads(out)), gates)
