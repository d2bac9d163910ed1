"""Spans of keys behind anchors on a power-law stripe: a search that reaches every token of the past.

A query at position t scores the anchors t + 1 - floor(i^(1/p)), i = s + 1, s + 2, ..., about t^p of them, and takes the
best few. Behind each it sees a span of about t^p' keys. The anchors nearest to it are left to a sliding window of
floor((s + 1)^(1/p)) - 1 keys. With p = p' = 1/2 and spans of 2 sqrt(t) keys every token of the past lies in some span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.patterns.cells import Cells, cells_of
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection

# Numbers gathered at a time.
_CHUNK = 1 << 22
# Score of a place that no anchor fills: no share beside any real score, equal shares where all are missing.
ABSENT = -1e9
# Queries are cut into parts, so that early ones with short spans are not padded to the longest.
_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """Where anchors stand and how long spans are.

    Args:
        index: s, stripes that the window replaces; the window has floor((s + 1)^(1/p)) - 1 keys.
        search_power: p, between 0 and 1: a query at t has about t^p anchors.
        backward: a span has ceil(backward (t + 1)^p') keys before its anchor,
        forward: and ceil(forward (t + 1)^p') behind it.
        span_power: p', between 0 and 1.
        official: compute powers in float32 as the authors do, which may miss a whole number by one.
    """

    index: int = 3
    search_power: float = 0.5
    backward: float = 2.0
    forward: float = 0.0
    span_power: float = 0.5
    official: bool = False

    def __post_init__(self):
        check_int(self.index, "index", 0)
        for name in ("search_power", "span_power"):
            if not 0 < getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "a number between 0 and 1")
        for name in ("backward", "forward"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise bad(name, value, "a number >= 0")

    @property
    def window(self) -> int:
        """How many keys, the query's own included, are seen without search."""
        return self._floor(self.index + 1) - 1

    def _floor(self, i: int) -> int:
        """Return floor(i^(1/p)), exact where 1/p is a whole number."""
        inverse = 1 / self.search_power
        return i ** int(inverse) if inverse == int(inverse) else int(i**inverse)

    def distances(self, n: int) -> list[int]:
        """Return floor(i^(1/p)) for the stripes of a sequence of n tokens, nearest first."""
        found, i = [], self.index + 1
        while self._floor(i) <= n:
            found.append(self._floor(i))
            i += 1
        inverse = 1 / self.search_power
        if self.official and inverse != int(inverse) and found:
            stripes = torch.arange(self.index + 1, i, dtype=torch.float32)
            return (stripes.log() * inverse).exp().floor().long().tolist()
        return found

    def reach(self, seen: Int[Tensor, "..."], factor: float) -> Int[Tensor, "..."]:
        """Return ceil(factor * seen^p')."""
        dtype = torch.float32 if self.official else torch.float64
        return (factor * seen.clamp(min=0).to(dtype) ** self.span_power).ceil().long()

    def longest(self, n: int) -> int:
        """Return the most keys of a span of a query that sees n tokens, with room for rounding in `reach`."""
        power = n**self.span_power
        reach = math.ceil(self.backward * power) + math.ceil(self.forward * power)
        return min(n, reach + 3)


class Spans(NamedTuple):
    """What the search found, best first.

    Attributes:
        start, end: first and last key of each span, -1 where there was no anchor left. Spans may overlap; none
            meets the window.
        score: product of query and anchor, with gradient to both; `ABSENT` where there is none.
    """

    start: Int[Tensor, "b h n_q k"]
    end: Int[Tensor, "b h n_q k"]
    score: Float[Tensor, "b h n_q k"]

    def gates(self) -> Float[Tensor, "b h n_q k"]:
        """Return the share of each span: a softmax over the scores, equal shares where there are no spans."""
        return self.score.softmax(-1)


def search_spans(
    q: Float[Tensor, "b h n_q d"],
    k: Float[Tensor, "b h_kv n_k d"],
    stripe: Stripe,
    *,
    spans: int,
    present: Bool[Tensor, "b n_k"] | None = None,
) -> Spans:
    """Return the spans behind the anchors that fit each query best. Only the scores have a gradient.

    Args:
        q: routing queries, which stand at the end of the keys. Products are not scaled.
        k: keys; H_kv divides H.
        stripe: where anchors stand.
        spans: how many spans a query takes. Among equal anchors it takes the farthest.
        present: False for padding, where no anchor stands. What comes before the first token that is there is
            not counted in the length of spans.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    check_int(spans, "spans", 1)
    (n_q, _), n_k = q.shape[2:], k.shape[2]
    if n_q > n_k:
        raise bad("q", tuple(q.shape), f"at most {n_k} queries, as they stand at the end of the keys")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {q.shape[1]} heads of q")
    compute = accumulation_dtype(q.dtype)
    q, k = q.to(compute), k.to(compute)
    at = torch.arange(n_k - n_q, n_k, device=q.device)
    anchor = _best_anchors(q, k, at, stripe, spans, present)
    there = anchor >= 0
    score = (q.unsqueeze(3) * _rows(k, anchor.clamp(min=0), q.shape[1])).sum(-1)
    score = torch.where(there, score, ABSENT)
    first = torch.zeros(1, dtype=torch.long, device=q.device) if present is None else present.int().argmax(1)
    first = first[:, None, None, None]
    seen = at[:, None] + 1 - first
    start = torch.maximum(anchor - stripe.reach(seen, stripe.backward), first).clamp(min=0)
    limit = (at - stripe.window).clamp(min=-1)[:, None]
    end = torch.minimum(anchor + stripe.reach(seen, stripe.forward), limit)
    return Spans(torch.where(there, start, -1), torch.where(there, end, -1), score)


@torch.no_grad()
def _best_anchors(
    q: Tensor, k: Tensor, at: Tensor, stripe: Stripe, spans: int, present: Tensor | None
) -> Int[Tensor, "b h n_q spans"]:
    b, h, n_q, d = q.shape
    best = q.new_full((b, h, n_q, spans), float("-inf"))
    anchor = torch.full((b, h, n_q, spans), -1, device=q.device)
    # From the farthest on, some stripes at a time; a stable order then leaves the farthest first among equals.
    far, window = stripe.distances(k.shape[2])[::-1], stripe.window
    far = torch.tensor(far, dtype=torch.long, device=q.device)
    grouped = q.unflatten(1, (k.shape[1], -1))
    for some in far.split(max(1, _CHUNK // max(b * h * n_q * d, 1))):
        place = at[:, None] + 1 - some
        rows = k[:, :, place.clamp(min=0)]
        scores = torch.einsum("bkgnd,bknsd->bkgns", grouped, rows).flatten(1, 2)
        # Rounded powers could bring the nearest stripe into the window.
        valid = (place >= 0) & (place <= at[:, None] - window)
        if present is not None:
            valid = (present[:, place.clamp(min=0)] & valid)[:, None]
        scores = scores.masked_fill(~valid, float("-inf"))
        every = torch.cat([best, scores], dim=-1)
        places = torch.cat([anchor, place.expand(scores.shape)], dim=-1)
        order = every.sort(dim=-1, descending=True, stable=True).indices[..., :spans]
        best, anchor = every.gather(-1, order), places.gather(-1, order)
    return torch.where(best == float("-inf"), -1, anchor)


def _rows(k: Float[Tensor, "b h_kv n d"], ids: Int[Tensor, "b h n_q s"], heads: int) -> Tensor:
    batch = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    head = torch.arange(heads, device=k.device)[:, None, None] // (heads // k.shape[1])
    return k[batch, head, ids]


def select_spans(found: Spans, n_k: int, stripe: Stripe) -> Selection:
    """Return the selection in which, for head h * k + j, every query sees its span j of head h.

    Args:
        found: spans of (B, H, N_q, k).
        n_k: number of keys, at whose end the queries stand.
        stripe: bounds the length of spans without looking at them.
    """
    start, end = (x.transpose(2, 3).flatten(1, 2) for x in (found.start, found.end))  # (b, h * k, n_q)
    n_q, device = start.shape[2], start.device
    size = max(-(-n_q // _PARTS), 1)
    cells = []
    for low in range(0, n_q, size):
        high = min(low + size, n_q)
        width = stripe.longest(n_k - n_q + high)
        ids = start[:, :, low:high, None] + torch.arange(width, device=device)
        there = (start[:, :, low:high, None] >= 0) & (ids <= end[:, :, low:high, None])
        q_ids = torch.arange(low, high, device=device)[None, None, :, None]
        cells.append(cells_of(q_ids, torch.where(there, ids, -1), None))
    nothing = torch.full((1, 1, 1, 1), -1, device=device)
    return Selection.of_cells(cells or [Cells(nothing, nothing)], n_q, n_k)
