"""AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity. arXiv 2505.23520, 2025.

Sparse causal attention for prompts, without training, in three passes. First every query attends to the initial
block and to its own run of `step` blocks; its largest logit there is its anchor. Then keys in between are looked
for one by one: a key is worth it when the mean query of some block of the run comes within theta of the block's
mean anchor. At last every query of the run attends to those keys too, and the parts are merged by log-sum-exp.

    near(i) = [0, b) and the run of i, causal;   m_i = max_{j in near(i)} q_i.k_j / sqrt(D)
    far(run) = {j between: some block B of the run has mean_B(q).k_j / sqrt(D) + theta >= mean_B(m)}
    out_i = softmax over near(i) and far(run of i) of q_i.k_j / sqrt(D), times v      (B, H, N, D)

Searched is everything between the initial block and the run. The authors' kernels leave out the last block before
the run, and in pass one everybody sees a whole initial run, whose keys count twice when the search finds them
again: `official=True`. They work in base 2 and half precision; here theta is in nats and sums are kept in full.
The selection was compared with a transcription of the authors' search; their three kernels were read, not run.

All queries of a run share one search, so that later ones help to choose keys for earlier ones: fit for prompts that
are known wholly. With `route="token"`, which is ours, every query searches for itself with its own anchor: causal in
the strict sense, at the price of logits with all keys.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.core.tracing import run_eagerly
from foveate.kernels.attend import attend
from foveate.kernels.merge import merge
from foveate.mechanisms.inputs import check_tokens
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.selection import Selection
from foveate.routing.stripes import StripeRouter


# What is found has another size in every call, so that compiling would only break and begin again.
@run_eagerly
def select_keys(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h_kv n d"],
    router: StripeRouter,
    *,
    scale: float | None = None,
) -> tuple[Selection, Selection]:
    """Return the keys of the first pass and those that the search finds. No gradient goes through the choice."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with torch.no_grad():
        return router.near(q.shape[2], q.device), router.select(q, k, router.anchors(q, k, factor), factor)


def anchor_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h_kv n d"],
    v: Float[Tensor, "b h_kv n e"],
    router: StripeRouter | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attend in three passes, the paper's operator.

    Args:
        q, k, v: of a whole prompt; H_kv divides H.
        router: where and how to search, as published by default.
        scale: factor on q.k^T, D**-0.5 by default.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `q` unless there are as many queries as keys: for one new query the search would
            cost what attention does, so decode with `attend(q, k, v)`, which is exact.
    """
    if q.shape[2] != k.shape[2]:
        hint = "This is for whole prompts: searching for a new query costs what exact attention does."
        raise bad("q", tuple(q.shape), f"{k.shape[2]} queries, as there are keys", hint)
    near, far = select_keys(q, k, router or StripeRouter(), scale=scale)
    passes = [attend(q, k, v, where=w, scale=scale, backend=backend, return_lse=True) for w in (near, far)]
    outs, lses = zip(*passes, strict=True)
    return merge(outs, lses)[0]


@system(
    key="anchor_attention",
    title="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
    arxiv="2505.23520",
    year=2025,
    family="routed",
    role="router",
    cost="O(N (b + G) C + N^2 C / b + N s C)",
    fidelity="vectors",
    causal="always",
    limits="For prompts: decode densely, as searching for one query costs what attending does. Always attends "
    "causally (in row-major order on a grid); chooses causally only with route='token', whose search costs O(N^2 C).",
)
class AnchorAttention(nn.Module):
    """Causal attention to the first keys, the nearby ones, and those found by their distance to the anchor.

    Args:
        dim: channels C.
        heads: number of query heads; must divide `dim`.
        block: b, tokens per block.
        step: blocks of a run.
        theta: how far below the anchor a logit may be, in nats.
        init: initial blocks that everybody sees.
        local: runs that are seen wholly, the query's own included.
        route: "block" (published: later tokens of a run help to choose) or "token" (strictly causal).
        qkv_bias: whether the q, k, v projections have a bias.
        official: the bounds of the authors' kernels, see above.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        block: int = 128,
        step: int = 16,
        theta: float = 12.0,
        init: int = 1,
        local: int = 1,
        route: Literal["block", "token"] = "block",
        qkv_bias: bool = True,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if route not in ("block", "token"):
            raise bad("route", route, "'block' or 'token'")
        self.dim, self.heads, self.backend = dim, heads, backend
        self.router = StripeRouter(
            block, step, theta, init=init, local=local, each=route == "token", official=official
        )
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "AnchorAttention":
        """Return blocks of about sqrt(N) / 2 tokens, 4 to a run, and keys above e^-4 of the largest weight.

        The published sizes are for long prompts, whose logits reach further down. Strictly causal if `causal`.
        """
        block = min(128, max(4, 1 << max(0, int(math.log2(grid.numel) / 2 - 1))))
        route = "token" if causal else "block"
        return cls(dim=dim, heads=heads, block=block, step=4, theta=4.0, route=route)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`, in row-major order.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        out = anchor_attention(q, k, v, self.router, backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, {self.router!r}"
