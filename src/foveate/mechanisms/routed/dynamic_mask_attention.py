"""Trainable Dynamic Mask Sparse Attention. arXiv 2508.02124, 2025.

Values say how much their key is worth being looked at: a gated projection of them gives one number per key and key
head, which is added to the logits, and only the w keys with the largest numbers so far are attended to. The choice
does not depend on the query apart from causality, so all heads of a group share it and decoding can forget keys
that can never come back. The bias learns through the keys that were kept.

    q, k = rotary(norm(x W_q)), rotary(norm(x W_k)),  v = x W_v      q (B, H, N, D), k, v (B, H_kv, N, D)
    bias = exp(A softplus(v W_dt))                                   (B, H_kv, N), A (H_kv,) starts at 0
    S_t  = top_w {bias_j : j <= t}                                   (B, H_kv, N, w)
    out_t = softmax_{j in S_t}(q_t k_j^T / sqrt(D) + bias_j) v_j     then W_o

`exponential=False` is the form without exp that the authors' later code prefers for numerical stability. Where keys
are worth the same the later one is kept (theirs takes any), so that at A = 0 this starts as a sliding window of w.
The paper's text leaves norms and rotary embedding to the model; they are those of the authors' Doge.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, extend, length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection
from foveate.routing.blocks import block_count, block_sizes, choose_top, select_blocks
from foveate.routing.prefix import seen_sizes, select_prefix_top, select_smooth
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.rotary import rotary

Keep = Literal["topk", "relu"]


def dynamic_mask_attention(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    bias: Float[Tensor, "b h_kv n_k"] | Float[Tensor, "b h_kv n_q n_k"],
    *,
    window: int = 2048,
    keep: Keep = "topk",
    smooth: int = 1,
    causal: bool = True,
    present: Bool[Tensor, "b n_k"] | None = None,
    visible: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend to the keys with the largest bias, which is added to their logits.

    Args:
        q, k, v: queries stand at the end of the keys; H_kv divides H.
        bias: one number per key, with gradient at keys that are kept. Or one per pair, which costs N_q x N_k.
        window: w, keys a query keeps.
        keep: "topk", or "relu" for all keys with a positive bias, however many.
        smooth: keys per block; a block is kept whole when more than half of it was chosen, else dropped. With
            `causal` it is its keys up to the query that count; theirs counts the others too.
        causal: whether a query sees keys up to its own position only.
        present: False for padding.
        visible: pairs that exist at all, broadcastable to (B, H_kv, N_q, N_k); costs N_q x N_k.
        scale: of the products, D**-0.5 by default.
        backend: of `attend`.

    Returns:
        Zeros for queries that keep no key.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    b, heads, n_q = q.shape[:3]
    h_kv, n_k = k.shape[1:3]
    if bias.shape not in ((b, h_kv, n_k), (b, h_kv, n_q, n_k)):
        raise bad("bias", tuple(bias.shape), f"{(b, h_kv, n_k)}, or {(b, h_kv, n_q, n_k)} for one per pair")
    if n_q > n_k:
        raise bad("q", tuple(q.shape), f"at most {n_k} queries, as they stand at the end of the keys")
    if heads % h_kv:
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {heads} heads of q")
    group = heads // h_kv
    # The heads of a group become rows of their key head: what they share is chosen and gathered once.
    rows = q.unflatten(1, (h_kv, group)).transpose(2, 3).flatten(2, 3)
    options = {"window": window, "smooth": smooth, "causal": causal, "present": present, "visible": visible}
    where, kept = select_kept(bias, n_q, group, keep=keep, **options)
    score = KeyBias(bias) if bias.ndim == 3 else Bias(bias.repeat_interleave(group, dim=2))
    out = attend(rows, k, v, where=where, score=score, mask=kept, scale=scale, backend=backend)
    return out.unflatten(2, (n_q, group)).transpose(2, 3).flatten(1, 2)


def select_kept(
    bias: Float[Tensor, "b h_kv *n_q n_k"],
    n_q: int,
    group: int = 1,
    *,
    window: int = 2048,
    keep: Keep = "topk",
    smooth: int = 1,
    causal: bool = True,
    present: Bool[Tensor, "b n_k"] | None = None,
    visible: Bool[Tensor, "..."] | None = None,
) -> tuple[Selection, Bool[Tensor, "b 1 1 n_k"] | None]:
    """Return which keys are kept, for `group` rows per query, and a mask of keys beside it. No gradient.

    Args:
        bias: as in `dynamic_mask_attention`, as are the other arguments.
        n_q: number of queries.
        group: rows of queries per position, see `select_prefix_top`.
    """
    if keep not in ("topk", "relu"):
        raise bad("keep", keep, "'topk' or 'relu'")
    check_int(window, "window", 1)
    check_int(smooth, "smooth", 1)
    bias, n_k = bias.detach(), bias.shape[-1]
    mask = None if present is None else present[:, None, None, :]
    if bias.ndim == 3 and causal and visible is None:
        if keep == "topk":
            where = select_prefix_top(bias, window, n_q=n_q, present=present, group=group, smooth=smooth)
            return where, mask
        positive = bias > 0 if present is None else (bias > 0) & present[:, None]
        return select_smooth(_counts_so_far(positive, n_q, smooth), smooth, n_k, group=group), mask
    scores = bias if bias.ndim == 4 else bias[:, :, None].expand(-1, -1, n_q, -1)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    for more in (Causal().dense(n_q, n_k, device=bias.device) if causal else None, visible, mask):
        allowed = allowed if more is None else allowed & more
    chosen = choose_top(scores, window, allowed) if keep == "topk" else (scores > 0) & allowed
    if smooth > 1:
        sizes = seen_sizes(n_q, n_k, smooth, bias.device) if causal else block_sizes(n_k, smooth, bias.device)
        blocks = functional.pad(chosen, (0, -n_k % smooth)).unflatten(-1, (-1, smooth)).sum(-1)
        chosen = (2 * blocks > sizes).repeat_interleave(smooth, dim=-1)[..., :n_k] & allowed
    return select_blocks(chosen, group, 1, n_q * group, n_k), mask


def _counts_so_far(positive: Bool[Tensor, "b h n_k"], n_q: int, smooth: int) -> Tensor:
    """Count the marked keys of each block up to each query, (b, h, n_q, blocks)."""
    n_k, device = positive.shape[-1], positive.device
    before = functional.pad(positive.long().cumsum(-1), (1, 0))
    first = torch.arange(block_count(n_k, smooth), device=device) * smooth
    at = torch.arange(n_k - n_q, n_k, device=device)[:, None] + 1
    last = torch.minimum(first + smooth, at).clamp(min=first)
    return before[..., last] - before[..., first][..., None, :]


class DynamicPast(NamedTuple):
    """Keys, values, and what each key is worth, of all tokens so far."""

    k: Float[Tensor, "b h_kv n d"]
    v: Float[Tensor, "b h_kv n e"]
    bias: Float[Tensor, "b h_kv n"]


@system(
    key="dynamic_mask_attention",
    title="Trainable Dynamic Mask Sparse Attention",
    arxiv="2508.02124",
    year=2025,
    family="routed",
    role="router",
    cost="O(N w C)",
    fidelity="vectors",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order. A key's worth is the "
    "same for every query, so what is dropped is lost to all of a group's heads.",
)
class DynamicMaskAttention(Decodes, nn.Module):
    """Causal attention to the keys whose values say they are worth it.

    Args:
        dim: channels C.
        heads: number of heads H; must divide `dim`.
        kv_heads: key heads H_kv, which divide `heads`; as many as heads by default.
        width: channels of a head, an even number; dim / heads by default.
        window: w, keys a query keeps.
        keep: "topk", or "relu" for all keys with a positive bias.
        smooth: keys per block, see `dynamic_mask_attention`.
        exponential: whether the bias is exp(A softplus(dt)), as in the paper, or without exp.
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
        window: int = 2048,
        keep: Keep = "topk",
        smooth: int = 1,
        exponential: bool = True,
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
        if keep not in ("topk", "relu"):
            raise bad("keep", keep, "'topk' or 'relu'")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.keep: Keep = keep
        self.window, self.smooth = check_int(window, "window", 1), check_int(smooth, "smooth", 1)
        self.exponential, self.base, self.backend = exponential, base, backend
        self.q_proj = nn.Linear(dim, heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.dt_proj = nn.Linear(kv_heads * width, kv_heads, bias=bias)
        self.A = nn.Parameter(torch.zeros(kv_heads))
        self.q_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(heads * width, dim, bias=bias)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "DynamicMaskAttention":
        """Return the layer with a quarter of the tokens kept; it is causal in either case."""
        return cls(dim=dim, heads=heads, window=max(8, grid.numel // 4))

    def key_bias(self, v: Float[Tensor, "b h_kv n d"]) -> Float[Tensor, "b h_kv n"]:
        """Return what each key is worth, from all key heads' values."""
        worth = self.A * functional.softplus(self.dt_proj(merge_heads(v)))
        return (worth.exp() if self.exponential else worth).transpose(1, 2)

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
        past: DynamicPast | None = None,
        *,
        present: Bool[Tensor, "b n_k"] | None = None,
        visible: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], DynamicPast]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        `present` (over all keys) and `visible` are those of `dynamic_mask_attention`.
        """
        q, past = self._project(x, past)
        return self.proj(merge_heads(self._attend(q, past, past.v, present, visible))), past

    def maps(
        self, x: Float[Tensor, "b n c"], *, visible: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b h n n"]:
        """Return the attention weights as dense maps, to look at."""
        q, past = self._project(x, None)
        n = x.shape[1]
        ones = torch.eye(n, dtype=x.dtype, device=x.device).expand(x.shape[0], self.kv_heads, n, n)
        return self._attend(q, past, ones, None, visible)

    def _project(self, x: Tensor, past: DynamicPast | None) -> tuple[Tensor, DynamicPast]:
        at = torch.arange(x.shape[1], device=x.device) + length(past)
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k = self.k_norm(split_heads(self.k_proj(x), self.kv_heads))
        v = split_heads(self.v_proj(x), self.kv_heads)
        new = DynamicPast(rotary(k, at, base=self.base), v, self.key_bias(v))
        return rotary(q, at, base=self.base), extend(past, new)

    def _attend(
        self, q: Tensor, past: DynamicPast, v: Tensor, present: Tensor | None, visible: Tensor | None
    ) -> Float[Tensor, "b h n e"]:
        options = {"window": self.window, "smooth": self.smooth, "present": present, "visible": visible}
        return dynamic_mask_attention(
            q, past.k, v, past.bias, keep=self.keep, backend=self.backend, **options
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, window={self.window}, "
            f"keep={self.keep!r}, smooth={self.smooth}, exponential={self.exponential}"
        )
