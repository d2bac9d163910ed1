"""Heads as experts: which heads a token uses and how strongly, and attention that computes no others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.kernels.attend import attend
from foveate.patterns.basic import Full
from foveate.patterns.pattern import Pattern, check_int
from foveate.routing.queries import keep_queries
from foveate.scores.after import After
from foveate.scores.base import Score


class Gates(NamedTuple):
    """What a router says about every token.

    Attributes:
        gates: factor of each head's output, the shared heads first; 0 where a head is not used.
        chosen: which of the routed heads (all but the shared ones) are used.
        balance: the load-balancing loss: as large as heads are routed when all are used alike, larger when not.
    """

    gates: Float[Tensor, "b n h"]
    chosen: Bool[Tensor, "b n e"]
    balance: Float[Tensor, ""]


def check_routing(heads: int, shared: int, routed: int) -> None:
    """Raise an ArgumentError unless `shared` heads and `routed` of the others can be used.

    Raises:
        ArgumentError: naming `shared` or `routed`.
    """
    check_int(shared, "shared", 0)
    check_int(routed, "routed", 0)
    if shared > heads:
        raise bad("shared", shared, f"at most heads={heads}")
    if routed > heads - shared:
        raise bad("routed", routed, f"at most {heads - shared}, the heads that are not shared")
    if routed == 0 and shared < heads:
        raise bad("routed", routed, f"1 or more, as only {shared} of {heads} heads are shared")


class HeadRouter(nn.Module):
    """Two-stage router: shared heads are always on, of the others each token takes the `routed` best.

    Gates of the chosen heads sum to `routed` and those of the shared ones to `shared`, each sum times one of two
    factors that sum to 2 where both kinds are there.

    Args:
        dim: channels C.
        heads: number of heads.
        shared: heads that are always on.
        routed: heads a token takes of the others.

    Raises:
        ArgumentError: naming `shared` or `routed`.
    """

    def __init__(self, dim: int, heads: int, *, shared: int, routed: int):
        super().__init__()
        check_routing(heads, shared, routed)
        self.heads, self.shared, self.routed = heads, shared, routed
        self.to_routed = nn.Linear(dim, heads - shared, bias=False) if routed else None
        self.to_shared = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.to_balance = nn.Linear(dim, 2, bias=False) if shared and routed else None

    def forward(self, x: Float[Tensor, "b n c"]) -> Gates:
        """Route every token."""
        loss, parts = x.new_zeros(()), []
        chosen = torch.ones(*x.shape[:2], 0, dtype=torch.bool, device=x.device)
        if self.shared:
            alike = x.new_ones(*x.shape[:2], self.shared)
            parts.append(alike if self.to_shared is None else self.to_shared(x).softmax(-1) * self.shared)
        if self.to_routed is not None:
            g = self.to_routed(x).softmax(-1)
            chosen = torch.zeros_like(g, dtype=torch.bool).scatter(
                -1, g.topk(self.routed, dim=-1).indices, True
            )
            kept = torch.where(chosen, g, 0.0)
            total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).eps)
            parts.append(kept / total * self.routed)
            loss = (g.mean((0, 1)) * chosen.to(g.dtype).mean((0, 1))).mean() * g.shape[-1] ** 2
        if self.to_balance is not None:
            balance = self.to_balance(x).softmax(-1) * 2
            parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
        return Gates(torch.cat(parts, dim=-1), chosen, loss)

    def extra_repr(self) -> str:
        """Show the numbers of heads."""
        return f"heads={self.heads}, shared={self.shared}, routed={self.routed}"


def attend_chosen(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    v: Float[Tensor, "b h_kv n_k e"],
    chosen: Bool[Tensor, "b n_q e"],
    *,
    where: Pattern | None = None,
    score: Callable[[slice], Sequence[Score]] | None = None,
    after: Callable[[slice], After] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q e"]:
    """Attend with the shared heads everywhere, and with each other head for the tokens that chose it.

    Args:
        q: queries; the first heads, as many as `chosen` leaves, are shared.
        k, v: keys and values; H_kv divides H.
        chosen: for the other heads, which tokens use them.
        where: who sees whom, a static pattern.
        score, after: those of a range of heads.
        scale, backend: as for `attend`.

    Returns:
        Zeros where a token did not choose a head: nothing was computed there.
    """
    heads, routed = q.shape[1], chosen.shape[2]
    outs = []
    for part in (slice(0, heads - routed), slice(heads - routed, heads)):
        if part.start == part.stop:
            continue
        # Backends of cells take "all keys" as a pattern; without one there would be nothing for them to skip.
        kept = Full() if where is None and backend != "auto" else where
        if routed and part.stop == heads:
            kept = keep_queries(chosen.transpose(1, 2), k.shape[2], where)
        outs.append(
            attend(
                q[:, part], _of_heads(part, heads, k), _of_heads(part, heads, v), where=kept,
                score=None if score is None else score(part), after=None if after is None else after(part),
                scale=scale, backend=backend,
            )
        )  # fmt: skip
    return torch.cat(outs, dim=1)


def _of_heads(part: slice, heads: int, x: Tensor) -> Tensor:
    """Return the key heads of a range of query heads: whole groups as they are, others head by head."""
    group = heads // x.shape[1]
    if part.start % group == 0 and part.stop % group == 0:
        return x[:, part.start // group : part.stop // group]
    return x[:, torch.arange(part.start, part.stop, device=x.device) // group]


def gated(out: Float[Tensor, "b h n d"], gates: Float[Tensor, "b n h"]) -> Float[Tensor, "b h n d"]:
    """Return every head's output times its gate."""
    return out * gates.transpose(1, 2).unsqueeze(-1).to(out.dtype)
