"""HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning. arXiv 2406.09827, 2024
(published at ICLR 2025 as "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically
Pruned Attention").

Made to replace attention in a trained model without training. A block of queries finds its keys by a binary search:
segments of the past are halved, one representative of each half is scored, the best stay, until they are single
blocks. It then attends exactly to what was kept, to the first tokens of the sequence and to a window of the last.

    M = ceil(k / b_k),  segments (start_i, size_i), i < M, cover the past but for the window       per query block
    repeat: (start, size) -> (start, size // 2), (start + size // 2, rest);  keep top_M of 2 M by
            score(half) = max_{rows r of the block, keys j of its representative} q_r . k_j
    out_t = softmax_{j <= t, j in kept + sinks + window}(q_t k_j^T / sqrt(D)) v_j     q (B, H, N, D), k (B, H_kv, N, D)

By default all rows of a query block ask, the centre of a half represents it, and the search goes on until every
segment is one block. `official=True` asks odd rows only, takes the first block of a half, and stops when segments have
one block on average, as the authors' reference does; see `search_tree`.
Queries of one block choose together, so with block_q > 1 a choice (never a value) depends on up to block_q - 1 later
tokens; block_q = 1 is strictly causal, and then decoding gives what prefill gives.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.merge import merge
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes, Past, extend, length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection
from foveate.routing.kept import KeptLayout
from foveate.routing.tree import Found, search_tree
from foveate.scores.rotary import rotary

# Queries that read a window together.
_CELL = 64


def hip_attention(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    *,
    keys: int = 512,
    block_q: int = 32,
    block_k: int = 1,
    group: int = 8,
    window: int = 128,
    sink: int = 32,
    oracle: bool = False,
    official: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend to the keys that a tree search finds, to the first `sink` and to a window of the last.

    Args:
        q, k, v: queries stand at the end of the keys; H_kv divides H. Every query head searches for itself.
        keys: how many keys the search keeps.
        block_q: queries that choose together.
        block_k, group: a key block has block_k * group keys; see `search_tree`.
        window: keys before the end of a query block that it sees without search, at least block_q and group.
        sink: keys at the start of the sequence that everybody sees, rounded up to whole key blocks.
        oracle: score halves by their best block.
        official: as the authors' reference; see the module's text.
        scale: of the products, D**-0.5 by default.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the argument that makes no sense.
    """
    options = {
        "keys": keys,
        "block_q": block_q,
        "block_k": block_k,
        "group": group,
        "window": window,
        "oracle": oracle,
        "official": official,
    }
    found, layout = _search(q, k, sink, **options)
    together = _CELL // block_q
    # One result of two needs the lse, which not every backend that could be named has.
    if official or together < 2 or window < block_q or q.shape[2] < _CELL or backend not in ("auto", "cpu"):
        where = Selection.of_cells([layout.both(found)], layout.n_q, layout.n_k)
        return attend(q, k, v, where=where, scale=scale, backend=backend)
    # What was found belongs to single query blocks; what is near is read once for several of them.
    pieces = []
    for cells in (layout.found(found), layout.near(together, q.device)):
        where = Selection.of_cells([cells], layout.n_q, layout.n_k)
        pieces.append(attend(q, k, v, where=where, scale=scale, backend=backend, return_lse=True))
    return merge(*zip(*pieces, strict=True))[0]


def hip_selection(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    *,
    keys: int = 512,
    block_q: int = 32,
    block_k: int = 1,
    group: int = 8,
    window: int = 128,
    sink: int = 32,
    oracle: bool = False,
    official: bool = False,
) -> tuple[Found, Selection]:
    """Return what the search found, and who attends to whom; arguments as in `hip_attention`. No gradient."""
    found, layout = _search(
        q,
        k,
        sink,
        keys=keys,
        block_q=block_q,
        block_k=block_k,
        group=group,
        window=window,
        oracle=oracle,
        official=official,
    )
    return found, Selection.of_cells([layout.both(found)], layout.n_q, layout.n_k)


def _search(q: Tensor, k: Tensor, sink: int, **options: Any) -> tuple[Found, KeptLayout]:
    """Check what `search_tree` does not, and search."""
    check_int(sink, "sink", 0)
    window, block_q, group = options["window"], options["block_q"], options["group"]
    if not options["official"] and check_int(window, "window", 1) < max(block_q, group):
        hint = "A smaller window leaves queries of a block without their own key."
        raise bad("window", window, f"at least block_q={block_q} and group={group}", hint)
    if q.shape[1] % k.shape[1]:
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {q.shape[1]} heads of q")
    found = search_tree(q, k, **options)
    size = options["block_k"] * group
    return found, KeptLayout(q.shape[2], k.shape[2], size, block_q, window, sink, whole=options["official"])


@system(
    key="hip_attention",
    title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
    arxiv="2406.09827",
    year=2024,
    family="routed",
    role="router",
    cost="O(N log(N / k) k C / b_q + N k C)",
    fidelity="vectors",
    causal="always",
    limits="Always causal: on a grid tokens see what comes before them in row-major order. With block_q > 1 which "
    "keys a query sees depends on later queries of its block. The choice gets no gradient.",
)
class HiPAttention(Decodes, nn.Module):
    """Causal attention to keys found by a hierarchical search, with projections and rotary embedding.

    Args:
        dim: channels C.
        heads: number of heads H; must divide `dim`, into an even width.
        kv_heads: key heads H_kv, which divide `heads`; as many as heads by default.
        keys, block_q, block_k, group, window, sink, oracle, official, backend: as in `hip_attention`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        keys: int = 512,
        block_q: int = 32,
        block_k: int = 1,
        group: int = 8,
        window: int = 128,
        sink: int = 32,
        oracle: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        kv_heads = heads if kv_heads is None else check_int(kv_heads, "kv_heads", 1)
        if heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        if width % 2:
            raise bad(
                "heads", heads, f"a number that divides dim={dim} into an even width, to rotate in pairs"
            )
        self.dim, self.heads, self.kv_heads, self.width, self.backend = dim, heads, kv_heads, width, backend
        self.search = {
            "keys": keys,
            "block_q": block_q,
            "block_k": block_k,
            "group": group,
            "window": window,
            "sink": sink,
            "oracle": oracle,
            "official": official,
        }
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * width, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "HiPAttention":
        """Return the published search for 512 keys, on fewer than 4096 tokens one for an eighth of them.

        It is causal in either case; strictly so, which means one query per block, when `causal`.
        """
        n = grid.numel
        if n >= 4096:
            return cls(dim=dim, heads=heads, block_q=1 if causal else 32, group=1 if causal else 8)
        few = max(8, n // 8)
        block_q = 1 if causal else 8
        return cls(dim=dim, heads=heads, keys=few, block_q=block_q, block_k=2, group=1, window=few, sink=4)

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
        sizes = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q, k, v = self.qkv(x).split(sizes, dim=-1)
        q, k = rotary(split_heads(q, self.heads), at), rotary(split_heads(k, self.kv_heads), at)
        past = extend(past, Past(k, split_heads(v, self.kv_heads)))
        return self.proj(merge_heads(hip_attention(q, *past, backend=self.backend, **self.search))), past

    def extra_repr(self) -> str:
        """Show the options."""
        shown = ", ".join(f"{name}={value}" for name, value in self.search.items())
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, {shown}"
