"""Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention. arXiv 2408.08454, 2024.

Grouped-query attention whose groups differ in size: H query heads are dealt to G key heads in proportion to how
large the keys of each are. KDGQA does so anew for every batch; DGQA every `window` training steps, from norms now
against a cache of those before; PGQA keeps equal groups and subtracts noise from their outputs.

    m_g = sum_b |k_bg|_F                                        (G,), the norm over tokens and channels
    KDGQA:  share = (m - min m) / (max m - min m)
    DGQA:   share = |cache - m|  or  0.9 m + 0.1 cache;         cache <- (cache + m) / window
    n_g   = round(H share_g / sum share), corrected until they add up to H;   consecutive heads in groups of n_g
    out   = softmax(q_g k_g^T / sqrt(D)) v_g per group          (B, H, N, D), then W_o
    PGQA:   out_g - r, r uniform with a zero diagonal, its rows brought to the mean and deviation of out_g's rows

The key head of the smallest norm has no share in KDGQA: it is usually left out altogether. Here equal norms give
equal groups, where the authors divide 0 by 0; corrections take from the largest and give to the smallest group, where
their DGQA draws; and evaluation keeps the groups and the cache of training and adds no noise, where theirs goes on to
change both with every batch it sees. `official=True` does it their way. A model with ordinary attention is turned
into this one by averaging the key and value heads of each group (`pool_heads`) and training on.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.uneven import attend_uneven
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.pattern import check_int
from foveate.routing.apportion import apportion

Groups = Literal["gqa", "kdgqa", "dgqa", "pgqa"]
Ratio = Literal["diff", "ema"]


def key_norms(k: Float[Tensor, "b g n d"]) -> Float[Tensor, "g"]:
    """Return the norm of each key head over tokens and channels, summed over the batch, without gradient."""
    return torch.linalg.vector_norm(k.detach().to(accumulation_dtype(k.dtype)), dim=(2, 3)).sum(0)


def norm_shares(norms: Float[Tensor, "g"]) -> Float[Tensor, "g"]:
    """Return KDGQA's shares: norms scaled to 0 .. 1; all ones where they are equal."""
    low, high = norms.aminmax()
    return torch.where(high > low, (norms - low) / (high - low), 1.0)


def pool_heads(x: Float[Tensor, "hd *c"], heads: int, kv_heads: int) -> Float[Tensor, "gd *c"]:
    """Return the rows (weight or bias) of a key or value projection, averaged over groups of heads.

    Args:
        x: rows of `heads` heads, one after the other.
        heads: number of heads H.
        kv_heads: number of groups G; must divide `heads`.

    Raises:
        ArgumentError: naming `kv_heads` or `x`.
    """
    if heads % check_int(kv_heads, "kv_heads", 1):
        raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
    if x.shape[0] % heads:
        raise bad("x", tuple(x.shape), f"a number of rows that {heads} heads divide")
    return x.unflatten(0, (kv_heads, heads // kv_heads, -1)).mean(1).flatten(0, 1)


def convert(
    weight: Float[Tensor, "three_c c"], bias: Float[Tensor, "three_c"] | None, heads: int, kv_heads: int
) -> dict[str, Tensor]:
    """Return the q, k, v entries of `KeyDrivenAttention`'s state_dict from one fused projection of all heads."""
    found = {}
    for kind, fused in (("weight", weight), ("bias", bias)):
        if fused is not None:
            q, k, v = fused.chunk(3)
            pooled = [pool_heads(x, heads, kv_heads) for x in (k, v)]
            found |= {f"q.{kind}": q, f"k.{kind}": pooled[0], f"v.{kind}": pooled[1]}
    return found


def perturb(
    out: Float[Tensor, "b h n d"], groups: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "b h n d"]:
    """Subtract noise from each group's output (PGQA): one draw per group for the whole batch."""
    rows = out.unflatten(1, (groups, -1)).flatten(3)
    noise = torch.rand(rows.shape[1:], generator=generator, device=out.device, dtype=torch.float32).to(
        out.dtype
    )
    diagonal = torch.eye(*noise.shape[1:], dtype=torch.bool, device=out.device)
    noise = noise.masked_fill(diagonal, 0.0)
    spread = noise.std(-1, keepdim=True)
    noise = (noise - noise.mean(-1, keepdim=True)) / torch.where(spread == 0, 1.0, spread)
    noise = noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)
    return (rows - noise).view(out.shape)


@system(
    key="key_driven_gqa",
    title="Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    arxiv="2408.08454",
    year=2024,
    family="scored",
    role="module",
    cost="O(N^2 C)",
    fidelity="vectors",
    limits="As many pairs as full attention; keys and values are G / H of it. groups='kdgqa' couples the samples of a "
    "batch, and one attention call is made per different group size.",
)
class KeyDrivenAttention(nn.Module):
    """Attention in which query heads are dealt to key heads by the norms of their keys.

    Args:
        dim: channels C.
        heads: number of query heads H.
        kv_heads: number of key heads G, which divides `heads`; half as many by default.
        groups: "gqa" for equal groups, "kdgqa" by the norms of each batch, "dgqa" by how norms evolve in training,
            "pgqa" for equal groups with noise.
        ratio: DGQA's shares, "diff" or "ema".
        window: DGQA's training steps between two allocations.
        qkv_bias: whether the q, k, v projections have a bias.
        official: evaluate, and correct sums, as the authors do, see the module's text.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    cache: Tensor
    sizes: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        groups: Groups = "dgqa",
        ratio: Ratio = "diff",
        window: int = 300,
        qkv_bias: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        kv_heads = max(1, heads // 2) if kv_heads is None else check_int(kv_heads, "kv_heads", 1)
        if heads % kv_heads:
            raise bad("kv_heads", kv_heads, f"a divisor of heads={heads}")
        if groups not in ("gqa", "kdgqa", "dgqa", "pgqa"):
            raise bad("groups", groups, "'gqa', 'kdgqa', 'dgqa' or 'pgqa'")
        if ratio not in ("diff", "ema"):
            raise bad("ratio", ratio, "'diff' or 'ema'")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.groups, self.ratio, self.official, self.backend = groups, ratio, official, backend
        self.window = check_int(window, "window", 1)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, kv_heads * width, bias=qkv_bias)
        self.v = nn.Linear(dim, kv_heads * width, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if groups == "dgqa":
            # What training found travels with the weights.
            self.register_buffer("cache", torch.zeros(kv_heads))
            self.register_buffer("sizes", torch.full((kv_heads,), heads // kv_heads))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "KeyDrivenAttention":
        """Return DGQA, the paper's best, with half as many key heads where their number is even.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "groups are formed by the norms of all tokens' keys")
        check_heads(dim, heads)
        return cls(dim=dim, heads=heads, kv_heads=heads // 2 if heads % 2 == 0 else heads)

    def allocate(
        self,
        k: Float[Tensor, "b g n d"],
        *,
        step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[int] | Int[Tensor, "g"]:
        """Return how many query heads each key head gets; DGQA updates its buffers when it is due.

        Args:
            k: keys of this batch.
            step: the training step; forwards in training are counted where it is left out.
            generator: for DGQA's corrections with `official=True`.
        """
        if self.groups in ("gqa", "pgqa"):
            return [self.heads // self.kv_heads] * self.kv_heads
        if self.groups == "kdgqa":
            return apportion(norm_shares(key_norms(k)), self.heads)
        due = self.official
        if self.training:
            self.steps.add_(1) if step is None else self.steps.fill_(step)
            due = int(self.steps) % self.window == 0
        if due:
            norms = key_norms(k).to(self.cache)
            evolved = (self.cache - norms).abs() if self.ratio == "diff" else 0.9 * norms + 0.1 * self.cache
            self.sizes.copy_(apportion(evolved, self.heads, random=self.official, generator=generator))
            self.cache.copy_((self.cache + norms) / self.window if self.training else norms)
        return self.sizes

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        *,
        step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Args:
            x: tokens.
            grid: their geometry.
            step: the training step, see `allocate`.
            generator: for PGQA's noise and, with `official=True`, DGQA's corrections.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part(x), self.kv_heads) for part in (self.k, self.v))
        sizes = self.allocate(k, step=step, generator=generator)
        out = attend_uneven(q, k, v, sizes, backend=self.backend)
        if self.groups == "pgqa" and (self.training or self.official):
            out = perturb(out, self.kv_heads, generator=generator)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, groups={self.groups!r}, "
            f"ratio={self.ratio!r}, window={self.window}, official={self.official}"
        )
