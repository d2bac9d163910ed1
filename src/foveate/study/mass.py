"""Captured mass, block of queries by block: nothing here is ever N x N.

For the queries of a block the whole softmax is there, (B, H, rows, N). Which of its pairs a pattern or a
selection has is asked for these rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.lazy import cached_property
from foveate.patterns.pattern import Pattern
from foveate.patterns.selection import Selection
from foveate.study.maps import Maps

# Weights of a block: some 64 MB in float32, and a few times that with what is derived from them.
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Rows:
    """Full attention of some queries.

    Attributes:
        q_ids: which queries, ascending.
        p: their weights over all keys; rows sum to 1.
        v: values of all keys.
        visible: keys each of them may see, (rows,).
        first: number of the first of these rows among all that are studied.
    """

    q_ids: Int[Tensor, "r"]
    p: Float[Tensor, "b h r n"]
    v: Float[Tensor, "b h n d"]
    visible: Int[Tensor, "r"]
    first: int

    @cached_property
    def full(self) -> Float[Tensor, "b h r d"]:
        """The output of full attention."""
        return self.p @ self.v

    @cached_property
    def cumulated(self) -> Float[Tensor, "b h r n"]:
        """Mass of the best 1, 2, 3, ... keys."""
        return self.p.sort(dim=-1, descending=True).values.cumsum(-1)

    def through(
        self, mask: Bool[Tensor, "#b #h r n"]
    ) -> tuple[Float[Tensor, "b h r"], Int[Tensor, "b h r"], Float[Tensor, "b h r d"]]:
        """Return what the pairs of a mask capture: their mass, their number, and softmax attention over them.

        The output of a query without a pair is zero.
        """
        kept = self.p * mask
        mass = kept.sum(-1)
        output = (kept @ self.v) / mass.masked_fill(mass == 0, 1.0)[..., None]
        return mass, mask.sum(-1).expand(mass.shape), output

    def oracle(self, count: Int[Tensor, "b h r"]) -> Float[Tensor, "b h r"]:
        """Return the most mass that `count` pairs of a query can have."""
        best = self.cumulated.gather(-1, (count - 1).clamp(min=0)[..., None])[..., 0]
        return best.masked_fill(count == 0, 0.0)

    def ranks(self, generator: torch.Generator | None = None) -> Int[Tensor, "b h r n"]:
        """Return the place of every key by weight, or at random with a `generator`: 0 first; N if not visible."""
        values = self.p
        if generator is not None:
            values = torch.rand(self.p.shape, generator=generator).to(self.p.device)
        n = values.shape[-1]
        order = values.masked_fill(~self._seen, -1.0).argsort(dim=-1, descending=True)
        places = torch.arange(n, dtype=torch.int32, device=order.device).expand_as(order)
        ranks = torch.empty_like(places, memory_format=torch.contiguous_format).scatter_(-1, order, places)
        return ranks.masked_fill(~self._seen, n)

    @property
    def _seen(self) -> Bool[Tensor, "r n"]:
        # With a causal mask, visible keys come first.
        return torch.arange(self.p.shape[-1], device=self.p.device) < self.visible[:, None]


def spaced(n: int, most: int) -> Int[Tensor, "r"]:
    """Return at most `most` of `n` ids, evenly spaced and without a common period with blocks.

    Evenly spaced ids alone would all have the same place within blocks of a power of two.
    """
    if most >= n:
        return torch.arange(n)
    start = torch.arange(most) * n // most
    width = (torch.arange(1, most + 1) * n // most) - start
    # The golden ratio's multiples fill any interval evenly: a place within each stretch of its own.
    place = (torch.arange(most) * 0.6180339887498949) % 1.0
    return start + (place * width).long()


def blocks(maps: Maps, q_ids: Int[Tensor, "r"], *, causal: bool) -> Iterator[Rows]:
    """Yield full attention of the queries `q_ids`, as many at a time as memory allows."""
    maps = maps.spread()
    q, k, v = maps.q, maps.k, maps.v
    rows = max(1, CHUNK // (q.shape[0] * q.shape[1] * maps.n))
    q_ids, keys, first = q_ids.to(q.device), torch.arange(maps.n, device=q.device), 0
    for part in q_ids.split(rows):
        logits = (q[:, :, part] @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        visible = torch.full_like(part, maps.n)
        if causal:
            visible = part + 1
            logits = logits.masked_fill(keys >= visible[:, None], float("-inf"))
        yield Rows(part, logits.softmax(-1), v, visible, first)
        first += len(part)


def rows_of(where: Pattern | Selection, q_ids: Int[Tensor, "r"], n: int) -> Bool[Tensor, "b h r n"]:
    """Return the rows `q_ids` of the mask of `where`, (B or 1, H or 1, rows, N).

    Raises:
        ArgumentError: naming `where` if it is a selection in which a pair that counts once stands twice.
    """
    if isinstance(where, Pattern):
        keys = torch.arange(n, device=q_ids.device)
        return where.allowed(q_ids[:, None], keys, n, n).expand(len(q_ids), n)[None, None]
    row = torch.full((n,), -1, device=q_ids.device)
    row[q_ids] = torch.arange(len(q_ids), device=q_ids.device)
    out = torch.zeros(*where.batch, len(q_ids), n, dtype=torch.bool, device=q_ids.device)
    pairs = 0
    for cell in where.cells:
        b, h, _, tq = cell.q_ids.shape
        at = torch.where(cell.q_ids >= 0, row[cell.q_ids.clamp(min=0)], -1)
        piece = torch.zeros(b, h, len(q_ids), n, dtype=torch.bool, device=q_ids.device)
        held = (at >= 0).nonzero()
        step = max(1, (CHUNK >> 2) // max(cell.k_ids.shape[3], 1))
        for some in held.split(step):
            which, slot = some[:, :3].unbind(1), some[:, 3]
            keys = cell.k_ids[which]
            allowed = keys >= 0
            if cell.mask is not None:
                mask = cell.mask.expand(b, h, -1, tq if cell.mask.shape[3] != 1 else 1, -1)
                cells = which[2] if mask.shape[2] != 1 else torch.zeros_like(which[2])
                allowed &= mask[which[0], which[1], cells, slot if mask.shape[3] != 1 else slot * 0]
            line, column = allowed.nonzero().unbind(1)
            place = at[(*which, slot)][line]
            piece[which[0][line], which[1][line], place, keys[line, column]] = True
            pairs += len(line) * (out.shape[0] // b) * (out.shape[1] // h)
        out |= piece
    if where.combine == "lse" and pairs != int(out.sum()):
        hint = "Drop the repetitions, for example with Selection.distinct()."
        raise bad("where", where, "a selection in which every pair stands once", hint)
    return out
