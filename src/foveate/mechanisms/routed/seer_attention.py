"""SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs. arXiv 2410.13276, 2024.

A small gate pools queries and keys per block and guesses how much attention every block of the map will get;
blocks below a threshold, or outside the best ones of a row, are skipped. The gate learns from the map itself:
while a model trains, attention is dense and the gate's distribution is drawn to the largest probability in
every block. Only the gate gets that gradient here; the authors train gates alone, with the model frozen.

    p = softmax(gate(q, k))                                (B, H, N / b, N / b), from q, k before their rotation
    out = softmax(q k^T / sqrt(D) where p > threshold) v   (B, H, N, D), whole blocks
    G_ij = max of the true probabilities in block (i, j), rows divided by their sum
    loss = mean of G (log G - log p) over entries, without the first quarter of the rows

As published (`route="block"`) all queries of a block share one choice, made from their mean: for prompts that are
known wholly, as later queries of the block take part in it. With `route="token"` every query chooses by itself
among the whole blocks behind it and always sees its own: causal in the strict sense, and the same as decoding one
query at a time, which the authors do in their second version (arXiv 2506.08889), there with heads of one group
choosing together. A row in which nothing passes the threshold is undefined in the authors' code; here a query
always sees its own block. In the non-causal form, which is ours, a ratio is simply the share of blocks.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.core.tracing import run_eagerly
from foveate.kernels.attend import attend
from foveate.mechanisms.auxiliary import with_loss
from foveate.mechanisms.block_gate import BlockGate, choose_blocks, gate_loss, true_blocks
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.selection import Selection
from foveate.routing.blocks import block_count, causal_blocks, select_blocks
from foveate.routing.takers import select_alone
from foveate.scores.rotary import rotary


def block_sparse_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h_kv n d"],
    v: Float[Tensor, "b h_kv n e"],
    chosen: Bool[Tensor, "b h q_blocks k_blocks"],
    block: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attend to the chosen blocks; rows without any give zeros."""
    where = select_blocks(chosen, block, block, q.shape[2], k.shape[2], causal=causal)
    return attend(q, k, v, where=where, scale=scale, backend=backend)


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
        k, v: (B, H_kv, N, D), as attention sees them.
        gate: (B, H_g, whole blocks, D_g), the gate's keys.
        rest: (B, H_kv, N modulo block, D), keys before rotation of the block that is not whole yet.
    """

    k: Tensor
    v: Tensor
    gate: Tensor
    rest: Tensor


@system(
    key="seer_attention",
    title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    arxiv="2410.13276",
    year=2024,
    family="routed",
    role="router",
    cost="O(r N^2 C + (N / b)^2 C)",
    fidelity="vectors",
    causal="optional",
    limits="Training is dense, and quadratic once more for the truth the gate learns from. "
    "Strictly causal only with route='token', whose gate costs O(N^2 C / b).",
)
class SeerAttention(nn.Module):
    """Attention to the blocks that a learned gate expects to matter; dense while it trains.

    In training mode `gate_loss` of the call is kept in the attribute `loss`, and its gradient reaches the gate
    with the output's (see `with_loss`): do not add it to the objective again.

    Args:
        dim: channels C.
        heads: number of query heads; must divide `dim`.
        kv_heads: key heads, as many as queries by default.
        block: tokens per block.
        gate_dim: channels of the gate, those of a head by default (128 for both in the paper).
        pooling: of the gate, see `BlockGate`.
        threshold: blocks of which the gate's probability is above it are taken (paper: 5e-4 to 5e-3).
        ratio: share of the map to take instead, None to go by `threshold`.
        causal: whether token i sees only tokens 0..i.
        route: "block" (published; causal in what is attended, not in what is chosen) or "token" (strict).
        rope: base of the rotary positions of queries and keys, None for none; the gate sees them before it.
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
        block: int = 64,
        gate_dim: int | None = None,
        pooling: str = "Qavg_Kmaxminavg",
        threshold: float = 2e-3,
        ratio: float | None = None,
        causal: bool = True,
        route: Literal["block", "token"] = "block",
        rope: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        if not 0 <= threshold < 1:
            raise bad("threshold", threshold, "a probability, at least 0 and below 1")
        if ratio is not None and not 0 <= ratio <= 1:
            raise bad("ratio", ratio, "a share between 0 and 1, or None")
        if route not in ("block", "token"):
            raise bad("route", route, "'block' or 'token'")
        self.dim, self.heads, self.block, self.backend = dim, heads, block, backend
        self.threshold, self.ratio, self.causal, self.route, self.rope = threshold, ratio, causal, route, rope
        self.gate = BlockGate(
            heads=heads, width=width, kv_heads=kv_heads, gate_dim=gate_dim, block=block, pooling=pooling
        )
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * self.gate.kv_heads * width, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.loss: Tensor | None = None

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "SeerAttention":
        """Return about sqrt(N) tokens per block (4 to 64) and a quarter of the map; strictly causal if causal."""
        block = min(64, max(4, 1 << int(math.log2(grid.numel) / 2)))
        return cls(
            dim=dim, heads=heads, block=block, ratio=0.25, causal=causal, route="token" if causal else "block"
        )

    def allowed(self, n: int, device: torch.device | None = None) -> Bool[Tensor, "rows k_blocks"]:
        """Say which key blocks each query block, or query, may choose among."""
        rows = 1 if self.route == "token" else self.block
        if self.causal and self.route == "block":
            return causal_blocks(n, n, rows, self.block, device=device)
        number = torch.arange(block_count(n, self.block), device=device)
        # A query's own block holds later keys, of which a strict choice must not know.
        own = self._own(n, device)[:, None]
        return number < own if self.causal else torch.ones_like(number < own)

    def _own(self, n: int, device: torch.device | None) -> Int[Tensor, "rows"]:
        """Return the key block of each query block, or query."""
        rows = 1 if self.route == "token" else self.block
        return torch.arange(block_count(n, rows), device=device) * rows // self.block

    def choose(
        self, logits: Float[Tensor, "b h rows k_blocks"], allowed: Bool[Tensor, "..."], *, published: bool
    ) -> Bool[Tensor, "b h rows k_blocks"]:
        """Choose blocks by the gate's logits; `published` says whether rows are blocks of a causal prompt."""
        return choose_blocks(
            logits,
            allowed,
            threshold=self.threshold if self.ratio is None else None,
            ratio=self.ratio,
            triangle=published,
            dense_rows=2 if published else 0,
        )

    @run_eagerly
    def select(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h_kv n d"]) -> Selection:
        """Return who attends to whom, from queries and keys before their rotation. No gradient."""
        n, rows = q.shape[2], 1 if self.route == "token" else self.block
        with torch.no_grad():
            allowed = self.allowed(n, q.device)
            logits = self.gate(q, k, allowed, query_block=rows)
            chosen = self.choose(logits, allowed, published=self.causal and self.route == "block")
            own = self._own(n, q.device)[:, None]
            chosen = chosen | (torch.arange(allowed.shape[1], device=q.device) == own)
        if rows == 1:
            return select_alone(chosen, self.block, n, n, causal=self.causal)
        return select_blocks(chosen, rows, self.block, n, n, causal=self.causal)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`, in row-major order.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self._project(x)
        if not self.training:
            return self._out(q, k, v, self.select(q, k))
        out = self._out(q, k, v, Causal() if self.causal else None)
        self.loss = self._distil(q.detach(), k.detach())
        return with_loss(out, self.loss)

    def _distil(self, q: Tensor, k: Tensor) -> Float[Tensor, ""]:
        rows, allowed = 1 if self.route == "token" else self.block, self.allowed(q.shape[2], q.device)
        truth = true_blocks(
            self._placed(q),
            self._placed(k),
            self.block,
            causal=self.causal,
            query_block=rows,
            allowed=allowed,
        )
        return gate_loss(self.gate(q, k, allowed, query_block=rows), truth)

    def prefill(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n c"], Cache]:
        """Mix a prompt, and return what `step` continues from.

        Raises:
            ArgumentError: naming `causal` when the module is not.
        """
        check_tokens(x, Grid(x.shape[1]), self.dim)
        self._check_decoding()
        q, k, v = self._project(x)
        whole = x.shape[1] // self.block * self.block
        cache = Cache(self._placed(k), v, self.gate.keys(k[:, :, :whole]), k[:, :, whole:])
        return self._out(q, k, v, self.select(q, k)), cache

    def step(self, x: Float[Tensor, "b c"], cache: Cache | None = None) -> tuple[Float[Tensor, "b c"], Cache]:
        """Mix one more token: it reads its own block and the blocks that the gate chooses, whatever `route` is.

        Raises:
            ArgumentError: naming `causal` when the module is not.
        """
        self._check_decoding()
        q, k, v = self._project(x[:, None])
        if cache is None:
            cache = Cache(k[:, :, :0], v[:, :, :0], self.gate.keys(k[:, :, :0]), k[:, :, :0])
        n, done = cache.k.shape[2], cache.gate.shape[2]
        everything = torch.ones(1, done, dtype=torch.bool, device=x.device)
        with torch.no_grad():
            logits = self.gate.logits(self.gate.queries(q, block=1, start=n), cache.gate)
            chosen = self.choose(logits, everything, published=False)
        chosen = functional.pad(chosen, (0, 1), value=True)
        keys, values = torch.cat([cache.k, self._placed(k, n)], 2), torch.cat([cache.v, v], 2)
        where = select_blocks(chosen, 1, self.block, 1, n + 1)
        out = attend(self._placed(q, n), keys, values, where=where, backend=self.backend)
        rest, gate = torch.cat([cache.rest, k], 2), cache.gate
        if rest.shape[2] == self.block:
            gate = torch.cat([gate, self.gate.keys(rest, start=n + 1 - self.block)], 2)
            rest = rest[:, :, :0]
        return self.proj(merge_heads(out)).squeeze(1), Cache(keys, values, gate, rest)

    def _check_decoding(self) -> None:
        if not self.causal:
            raise bad("causal", False, "True to decode", "Build the module with causal=True.")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        kv_heads = self.gate.kv_heads
        return split_heads(self.q(x), self.heads), split_heads(k, kv_heads), split_heads(v, kv_heads)

    def _placed(self, x: Tensor, start: int = 0) -> Tensor:
        if self.rope is None:
            return x
        return rotary(x, torch.arange(start, start + x.shape[2], device=x.device), base=self.rope)

    def _out(self, q: Tensor, k: Tensor, v: Tensor, where: Selection | Causal | None) -> Tensor:
        out = attend(self._placed(q), self._placed(k), v, where=where, backend=self.backend)
        return self.proj(merge_heads(out))

    def __getstate__(self) -> dict:
        # The loss belongs to a graph of the last call, which copies and pickles do not share.
        return {**super().__getstate__(), "loss": None}

    def extra_repr(self) -> str:
        """Show the options."""
        rule = f"threshold={self.threshold}" if self.ratio is None else f"ratio={self.ratio}"
        return f"dim={self.dim}, heads={self.heads}, {rule}, causal={self.causal}, route={self.route!r}"
