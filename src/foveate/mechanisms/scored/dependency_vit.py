"""Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention. arXiv 2304.03282, 2023.

Attention turned around: a token (child) spreads its value over the tokens it attends to (parents), so that what a
token sends sums to one, instead of gathering what sums to one. A head selector says with which heads a token sends,
and a message gate how much it sends at all; gates multiply over the layers, so that tokens that fell silent (leaves)
may be dropped, and the parents of all layers chained make a tree.

    A = softmax_j(q_i . k_j / sqrt(D))                      (B, H, N, N), row i: child i's distribution over parents j
    P = softmax_h(x_i W_P / 0.1)                            (B, H, N), W_P (C, H)
    m <- m sigmoid(W_2 GELU(W_1 x_i))                       (B, N), from 1 before the first layer; W_1 (C, C/2)
    R[j, i] = A[i, j] P_h[i] m[i]                           (B, H, N, N), reversed: receivers j, senders i
    out_j = W_o [sum_i R[j, i] v_i]_h                       (B, N, C)
    mask = sum_h R                                          (B, N, N); the parent of i is argmax_j mask[j, i]

Normalising over queries is a second pass of attention in which queries and keys change places and the row sums of
the first are a bias (`collect`), so that no N x N matrix is kept. The authors released no code. Beyond the paper's
text these are inferred, in agreement with a port by others: no bias in any map but the last, m on the tokens before
they are pooled, and the number of tokens kept (a share 1 - 0.16 s of them after pruning s times, by m). The chain of
parents over layers is our reading of the paper's progressive induction of the tree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.collect import collect
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads


@system(
    key="dependency_vit",
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    arxiv="2304.03282",
    year=2023,
    family="scored",
    role="module",
    cost="O(N^2 C)",
    fidelity="paper",
    primitive="attend (collect: its transpose)",
    limits="Dense, in two passes. Rows of the output are not normalised: a popular parent receives many messages.",
)
class ReversedAttention(nn.Module):
    """Attention in which tokens send to those they attend to.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        temperature: of the head selector; towards 0 a token sends with one head alone.
        qkv_bias: whether the q, k, v projections have a bias.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `dim`, `heads` or `temperature`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        temperature: float = 0.1,
        qkv_bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        if not temperature > 0:
            raise bad("temperature", temperature, "a positive number")
        self.dim, self.heads, self.temperature, self.backend = dim, heads, temperature, backend
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.selector = nn.Linear(dim, heads, bias=False)
        inner = max(1, dim // 2)
        self.message = nn.Sequential(
            nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, 1, bias=False)
        )
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "ReversedAttention":
        """Return one layer; it takes every grid, as it knows no positions.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "messages go from every token to every token")
        return cls(dim=dim, heads=heads)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`, all of which have sent everything so far.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.send(x)[0]

    def send(
        self, x: Float[Tensor, "b n c"], messages: Float[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Mix tokens, on a grid or what pruning left of one.

        Args:
            x: the tokens.
            messages: m after the layers before, 1 by default.

        Returns:
            The mixed tokens, and m after this layer, in float32 or wider.
        """
        q, k, v = self.qkv(x)
        strength, messages = self.gates(x, messages)
        return self.proj(merge_heads(self._reverse(q, k, v * strength.unsqueeze(-1).to(v.dtype)))), messages

    def gates(
        self, x: Float[Tensor, "b n c"], messages: Float[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b n"]]:
        """Return what each token sends with each head (P m), and m after this layer."""
        wide = accumulation_dtype(x.dtype)
        gate = self.message(x).squeeze(-1).to(wide).sigmoid()
        after = gate if messages is None else messages.to(wide) * gate
        share = (self.selector(x).to(wide) / self.temperature).softmax(-1).transpose(1, 2)
        return share * after.unsqueeze(1), after

    def dependencies(
        self, x: Float[Tensor, "b n c"], messages: Float[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n n"]:
        """Return the soft dependency mask, receivers by senders, all N x N of it: for trees and pictures."""
        q, k, _ = self.qkv(x)
        strength, _ = self.gates(x, messages)
        return self._reverse(q, k, torch.diag_embed(strength.to(q.dtype))).sum(1)

    def _reverse(self, q: Tensor, k: Tensor, sent: Tensor) -> Tensor:
        """Return A^T sent. The first pass is there for its row sums, so that one value channel will do."""
        _, lse = attend(q, k, k[..., :1], backend=self.backend, return_lse=True)
        return collect(q, k, sent, lse, backend=self.backend)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, temperature={self.temperature}"


class DependencyBlock(nn.Module):
    """Transformer block around `ReversedAttention`: pre-norm, MLP, residuals with a factor per channel.

    Args:
        dim, heads, temperature, backend: as in `ReversedAttention`.
        mlp_ratio: hidden width of the MLP over `dim`.
        layer_scale: initial value of the factors, None for none.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        temperature: float = 0.1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        backend: str = "auto",
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReversedAttention(dim=dim, heads=heads, temperature=temperature, backend=backend)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        init = None if layer_scale is None else torch.full((dim,), layer_scale)
        self.scale1 = None if init is None else nn.Parameter(init.clone())
        self.scale2 = None if init is None else nn.Parameter(init.clone())

    def forward(
        self, x: Float[Tensor, "b n c"], messages: Float[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Apply the block; take and return m as `ReversedAttention.send` does."""
        mixed, messages = self.attn.send(self.norm1(x), messages)
        x = x + (mixed if self.scale1 is None else self.scale1 * mixed)
        changed = self.mlp(self.norm2(x))
        return x + (changed if self.scale2 is None else self.scale2 * changed), messages


class Kept(NamedTuple):
    """What a trunk returns: tokens that were never pruned, weighted by m, ready to be averaged over."""

    tokens: Float[Tensor, "b kept c"]
    messages: Float[Tensor, "b kept"]
    ids: Int[Tensor, "b kept"]


class DependencyTrunk(nn.Module):
    """Blocks in a row through which m accumulates; the Lite form drops silent tokens on its way.

    Args:
        dim, heads, temperature, mlp_ratio, layer_scale, backend: as in `DependencyBlock`.
        depth: number of blocks.
        prune: share of all tokens dropped each time, 0 for none (Lite: 0.16).
        prune_after: blocks after which tokens are dropped, counted from 1.

    Raises:
        ArgumentError: naming `prune`.
    """

    def __init__(
        self, *, depth: int, prune: float = 0.0, prune_after: Sequence[int] = (2, 5, 8, 11), **block
    ):
        super().__init__()
        if not 0 <= prune * len(prune_after) < 1:
            most = f"{1 / max(len(prune_after), 1):.2f}"
            raise bad(
                "prune", prune, f"a share from 0 to below {most}, as it is dropped {len(prune_after)} times"
            )
        self.prune, self.prune_after = prune, tuple(prune_after)
        self.blocks = nn.ModuleList(DependencyBlock(**block) for _ in range(depth))
        self.norm = nn.LayerNorm(block["dim"], eps=1e-6)

    def kept(self, n: int) -> list[int]:
        """Return how many of `n` tokens each block works on, and how many are left after the last."""
        layers = range(len(self.blocks) + 1)
        times = [sum(at <= layer for at in self.prune_after) for layer in layers]
        # What rounding takes from a whole number is given back.
        return [max(1, int(n * (1 - t * self.prune) + 1e-6)) for t in times]

    def forward(self, x: Float[Tensor, "b n c"]) -> Kept:
        """Run all blocks."""
        messages = None
        ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block, n in zip(self.blocks, self.kept(x.shape[1])[1:], strict=True):
            x, messages = block(x, messages)
            x, messages, chosen = prune(x, messages, n)
            ids = ids.gather(1, chosen)
        assert messages is not None, "there is at least one block"
        return Kept(self.norm(x) * messages.unsqueeze(-1).to(x.dtype), messages, ids)

    def parents(self, x: Float[Tensor, "b n c"]) -> Int[Tensor, "layers b n"]:
        """Return every token's parent in every layer, with nothing pruned; `chain` makes a tree of them."""
        messages, found = None, []
        for block in self.blocks:
            assert isinstance(block, DependencyBlock)
            found.append(block.attn.dependencies(block.norm1(x), messages).argmax(1))
            x, messages = block(x, messages)
        return torch.stack(found)


def prune(
    x: Float[Tensor, "b n c"], messages: Float[Tensor, "b n"], keep: int
) -> tuple[Float[Tensor, "b keep c"], Float[Tensor, "b keep"], Int[Tensor, "b keep"]]:
    """Keep the tokens that send most, in their order. The choice itself has no gradient.

    Returns:
        The tokens, their messages, and their places in `x`.

    Raises:
        ArgumentError: naming `keep`.
    """
    if not 1 <= keep <= x.shape[1]:
        raise bad("keep", keep, f"from 1 to {x.shape[1]} tokens")
    ids = messages.detach().topk(keep, dim=1).indices.sort(dim=1).values
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2])), messages.gather(1, ids), ids


def chain(parents: Int[Tensor, "layers b n"]) -> Int[Tensor, "levels b n"]:
    """Return where each token's message has got to after 0, 1, ... layers: the levels of a forest.

    levels[0] is the token itself, levels[l + 1] the parent in layer l of where it was. Tokens that have met stay
    together, so that each level is a coarser partition than the one before, and (level, token) are the nodes of
    a forest whose roots are the places left at the end.
    """
    levels = [torch.arange(parents.shape[-1], device=parents.device).expand(parents.shape[1:])]
    for layer in parents:
        levels.append(layer.gather(-1, levels[-1]))
    return torch.stack(levels)


def edges(levels: Int[Tensor, "levels n"]) -> Int[Tensor, "e 3"]:
    """Return the edges (level, child, parent) of one sample's forest, each once: child at `level`, parent above."""
    found = []
    for level in range(len(levels) - 1):
        pairs = torch.stack([levels[level], levels[level + 1]], dim=1).unique(dim=0)
        found.append(functional.pad(pairs, (1, 0), value=level))
    return torch.cat(found) if found else levels.new_zeros(0, 3)
