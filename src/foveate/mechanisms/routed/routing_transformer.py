"""Efficient Content-Based Sparse Attention with Routing Transformers. arXiv 2003.05997, 2020.

Queries and keys are put on a sphere and scored against K centroids per head. Every centroid takes its top w
queries and top w keys and runs softmax attention among them; what a query gets from the centroids that took
it is averaged. Half of the heads stay local. Centroids follow their members by a moving average, and a
commitment loss draws the members to them.

    q, k = layernorm(q), layernorm(k)                                  (B, H, N, D), no scale, no bias
    I_c = sorted top_w(q . mu_c),  J_c = sorted top_w(k . mu_c)        (B, H, K, w)
    o_c = softmax(q[I_c] k[J_c]^T) v[J_c]                              no 1 / sqrt(D)
    out_i = sum_{c: i in I_c} o_c,i / (|{c: i in I_c}| + 0.01)

With `masked=True` a token sees positions up to its own. The authors mask by rank inside a cell instead, which
is the same where queries and keys are shared and lets a query see later keys where they are not:
`official=True`. Even masked this is not causal, since later tokens decide which ones a centroid takes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.basic import SlidingWindow
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.routing.clusters import OnlineKMeans, on_sphere, top_members


class Routed(NamedTuple):
    """What `ClusterRouting` returns: the output (B, H, N, D_v), and the commitment loss."""

    out: Tensor
    loss: Tensor


class ClusterRouting(nn.Module):
    """The routed heads: attention inside the cells of learned centroids.

    Args:
        heads: number of heads.
        width: channels of a head.
        clusters: centroids K per head; sqrt(N) is the paper's choice.
        members: w, queries and keys a centroid takes; N / K is the paper's choice.
        masked: whether a token sees only positions up to its own.
        share_qk: use the queries' vectors as keys too.
        strided: take members at all degrees of fit (see `top_members`).
        beta: factor of the commitment loss.
        decay: of the centroids' moving average.
        official: reproduce the authors' mask by rank and their scrambled member counts.
        backend: of `attend`.
    """

    def __init__(
        self,
        *,
        heads: int,
        width: int,
        clusters: int,
        members: int,
        masked: bool = False,
        share_qk: bool = False,
        strided: bool = False,
        beta: float = 1e-4,
        decay: float = 0.999,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        for name, value in (("clusters", clusters), ("members", members)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        self.members, self.masked, self.share_qk, self.strided = members, masked, share_qk, strided
        self.beta, self.official, self.backend = beta, official, backend
        self.centroids = OnlineKMeans(heads, clusters, width, decay=decay, official=official)

    def select(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Selection:
        """Return the cells for queries and keys on the sphere. No gradient goes through the choice."""
        take = {"size": self.members, "strided": self.strided}
        q_ids = top_members(self.centroids(q.detach()), **take)
        k_ids = q_ids if self.share_qk else top_members(self.centroids(k.detach()), **take)
        mask = None
        if self.masked and self.official:
            mask = torch.ones(self.members, self.members, dtype=torch.bool, device=q.device).tril()
        elif self.masked:
            mask = k_ids[..., None, :] <= q_ids[..., :, None]
        return Selection(q_ids, k_ids, mask, n_q=q.shape[2], n_k=k.shape[2], combine=Mean(1e-2))

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        *,
        present: Bool[Tensor, "b n"] | None = None,
    ) -> Routed:
        """Attend, and in training mode move the centroids.

        Args:
            q, k, v: per head. Scaling q or k changes nothing.
            present: False for padding tokens: nobody attends to them and no centroid follows them.

        Returns:
            Zeros for queries that no centroid took.
        """
        q = on_sphere(q)
        k = q if self.share_qk else on_sphere(k)
        mask = None if present is None else present[:, None, None, :]
        out = attend(q, k, v, where=self.select(q, k), mask=mask, scale=1.0, backend=self.backend)
        q_loss = self.centroids.commitment(q)
        loss = q_loss + (q_loss if self.share_qk else self.centroids.commitment(k))
        if self.training:
            self.centroids.update(q, present)
            if not self.share_qk:
                self.centroids.update(k, present)
        return Routed(out, self.beta * loss)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"members={self.members}, masked={self.masked}, share_qk={self.share_qk}"


@system(
    key="routing_transformer",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    arxiv="2003.05997",
    year=2020,
    family="routed",
    role="router",
    cost="O(N^1.5 C) with sqrt(N) centroids",
    fidelity="vectors",
    batch_coupled=False,
    limits="Not causal even when masked: later tokens take part in the choice of members.",
)
class RoutingAttention(nn.Module):
    """Self-attention with local heads and routed heads side by side.

    After a forward pass `commitment_loss` holds the loss to add to the objective.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        clusters: centroids per routed head.
        members: queries and keys a centroid takes.
        routed_heads: how many heads are routed, half of them by default (at least one).
        window: reach of the local heads, tokens on either side (before only when masked).
        masked: whether a token sees only positions up to its own.
        share_qk: use the queries' vectors as keys in routed heads.
        beta, decay, official, backend: as in `ClusterRouting`.

    Raises:
        ArgumentError: naming `routed_heads`, `clusters` or `members`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        clusters: int = 16,
        members: int = 512,
        routed_heads: int | None = None,
        window: int = 256,
        masked: bool = False,
        share_qk: bool = False,
        beta: float = 1e-4,
        decay: float = 0.999,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        routed = max(heads // 2, 1) if routed_heads is None else routed_heads
        if not 1 <= routed <= heads:
            raise bad("routed_heads", routed_heads, f"between 1 and heads={heads}")
        self.dim, self.heads, self.routed_heads, self.backend = dim, heads, routed, backend
        self.qkv = QKV(dim, heads, bias=False)
        self.routing = ClusterRouting(
            heads=routed,
            width=width,
            clusters=clusters,
            members=members,
            masked=masked,
            share_qk=share_qk,
            beta=beta,
            decay=decay,
            official=official,
            backend=backend,
        )
        self.local = SlidingWindow(window, 0 if masked else window)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.commitment_loss: Tensor | None = None

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "RoutingAttention":
        """Return about sqrt(N) centroids that take 2 N / K tokens each, and local heads that see as many.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "which tokens a centroid takes depends on later ones")
        n = grid.numel
        clusters = max(1, round(n**0.5))
        members = min(n, max(1, 2 * n // clusters))
        return cls(dim=dim, heads=heads, clusters=clusters, members=members, window=max(1, members // 2))

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, present: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens; local heads look along the flattened order.

        Args:
            x: tokens.
            grid: their geometry.
            present: False for padding tokens.

        Raises:
            ArgumentError: naming `x`, `grid`, or `size` when there are fewer tokens than `members`.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        r = self.routed_heads
        out, self.commitment_loss = self.routing(q[:, :r], k[:, :r], v[:, :r], present=present)
        if r < self.heads:
            mask = None if present is None else present[:, None, None, :]
            near = attend(q[:, r:], k[:, r:], v[:, r:], where=self.local, mask=mask, backend=self.backend)
            out = torch.cat([out, near], dim=1)
        return self.proj(merge_heads(out))

    def __getstate__(self) -> dict:
        # The loss belongs to a graph of the last call, which copies and pickles do not share.
        return {**super().__getstate__(), "commitment_loss": None}

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, routed_heads={self.routed_heads}, local={self.local!r}"
