"""Superlinear Multi-Step Attention. arXiv 2601.18401, 2026.

Attention as a jump search in two steps, so that any token of the past can be reached at a cost of N^(3/2). A routing
query scores about sqrt(t) anchors behind the query at t, spaced like the squares; behind each of the k best lies a
span of about 2 sqrt(t) keys, and consecutive spans overlap. Each span is attended to together with a sliding window,
and the k results are mixed by a softmax over the anchors' scores. That gate is how the search learns: which anchors
are best has no gradient, how good they are has.

    a_i = t + 1 - floor(i^(1/p)),  s_i = q1_t . k_{a_i}       i = s + 1, ..., about t^p anchors; no 1/sqrt(D)
    top k of the s_i:  span_j = {a_j - ceil(b (t+1)^p'), ..., a_j + ceil(f (t+1)^p')}, cut off at the window
    o_j = softmax(q2_t K^T / sqrt(D)) V over span_j + window       q1, q2 (B, H, N, D), k, v (B, H_kv, N, D)
    out = sum_j softmax_j(s) o_j                                   the window counts in every o_j

The window has floor((s + 1)^(1/p)) - 1 keys, so that the nearest anchor stands just before it. The operator follows
the authors' code. That position comes from elsewhere (no rotary embedding here) and that keys of search and attention
are the same was inferred from their model.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.merge import merge_shares
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import SlidingWindow
from foveate.patterns.pattern import check_int
from foveate.routing.spans import Spans, Stripe, search_spans, select_spans


def superlinear_attention(
    q1: Float[Tensor, "b h n_q d"],
    q2: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    stripe: Stripe | None = None,
    *,
    spans: int = 2,
    present: Bool[Tensor, "b n_k"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Search spans with `q1`, attend to them and to a window with `q2`, and mix.

    Args:
        q1, q2: routing and attention queries, which stand at the end of the keys.
        k, v: keys and values; H_kv divides H.
        stripe: where anchors stand and how long spans are.
        spans: how many spans a query sees.
        present: False for padding.
        scale: of the products of `q2`, D**-0.5 by default.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    stripe = Stripe() if stripe is None else stripe
    if q1.shape != q2.shape:
        raise bad("q1", tuple(q1.shape), f"{tuple(q2.shape)}, the shape of q2")
    found = search_spans(q1, k, stripe, spans=spans, present=present)
    return attend_spans(q2, k, v, found, stripe, present=present, scale=scale, backend=backend)


def attend_spans(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    found: Spans,
    stripe: Stripe,
    *,
    present: Bool[Tensor, "b n_k"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend to each span together with the window, and mix by the gates; arguments as above."""
    count = found.start.shape[-1]
    mask = None if present is None else present[:, None, None, :]
    # Every span of a head is a head of its own; the window is attended to once and merged into all of them.
    each = q.unsqueeze(2).expand(-1, -1, count, -1, -1).flatten(1, 2)
    where = select_spans(found, k.shape[2], stripe)
    far, lse = attend(each, k, v, where=where, mask=mask, scale=scale, backend=backend, return_lse=True)
    far, lse, gates = (
        far.unflatten(1, (-1, count)),
        lse.unflatten(1, (-1, count)),
        found.gates().transpose(2, 3),
    )
    out = torch.zeros((), dtype=gates.dtype, device=q.device)
    if stripe.window:
        window = SlidingWindow(stripe.window - 1)
        near, near_lse = attend(
            q, k, v, where=window, mask=mask, scale=scale, backend=backend, return_lse=True
        )
        (far_share, near_share), _ = merge_shares([lse, near_lse.unsqueeze(2).expand_as(lse)])
        out = near * (gates * near_share).sum(2).unsqueeze(-1)
        gates = gates * far_share
    for piece, gate in zip(far.unbind(2), gates.unsqueeze(-1).unbind(2), strict=True):
        out = torch.addcmul(out, piece.to(gate.dtype), gate)
    return out.to(q.dtype)


@system(
    key="superlinear_attention",
    title="Superlinear Multi-Step Attention",
    arxiv="2601.18401",
    year=2026,
    family="routed",
    role="router",
    cost="O(N^1.5 k C)",
    fidelity="vectors",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order. Knows no positions "
    "but the order that causality gives.",
)
class SuperlinearAttention(Decodes, nn.Module):
    """Two-step attention with projections.

    Args:
        dim: channels C.
        heads: number of heads H; must divide `dim`.
        kv_heads: key heads H_kv, which divide `heads`; as many as heads by default.
        spans: how many spans a query sees.
        index, search_power, backward, forward, span_power: as in `Stripe`; index 3 is a window of 15 tokens.
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
        spans: int = 2,
        index: int = 3,
        search_power: float = 0.5,
        backward: float = 2.0,
        forward: float = 0.0,
        span_power: float = 0.5,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        kv_heads = heads if kv_heads is None else check_int(kv_heads, "kv_heads", 1)
        if heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        self.dim, self.heads, self.kv_heads, self.backend = dim, heads, kv_heads, backend
        self.spans = check_int(spans, "spans", 1)
        self.stripe = Stripe(
            index=index,
            search_power=search_power,
            backward=backward,
            forward=forward,
            span_power=span_power,
        )
        self.search = nn.Linear(dim, dim, bias=bias)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, kv_heads * width, bias=bias)
        self.value = nn.Linear(dim, kv_heads * width, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "SuperlinearAttention":
        """Return a window of 15 tokens for long sequences and of 3 for short ones; causal in either case."""
        return cls(dim=dim, heads=heads, index=3 if grid.numel > 64 else 1)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def prefill(
        self,
        x: Float[Tensor, "b n c"],
        past: Past | None = None,
        *,
        present: Bool[Tensor, "b n_k"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Past]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Args:
            x: tokens.
            past: keys and values before them.
            present: False for padding, over all keys.
        """
        q1, q2 = (split_heads(project(x), self.heads) for project in (self.search, self.query))
        k, v = (split_heads(project(x), self.kv_heads) for project in (self.key, self.value))
        past = extend(past, Past(k, v))
        options = {"spans": self.spans, "present": present, "backend": self.backend}
        return self.proj(merge_heads(superlinear_attention(q1, q2, *past, self.stripe, **options))), past

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, spans={self.spans}, {self.stripe}"
        )
