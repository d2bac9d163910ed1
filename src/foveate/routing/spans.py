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

# Numbers gathered at a time, and numbers of a product that is summed up at once.
_CHUNK, _TEMPORARY = 1 << 22, 1 << 18
# From so many queries on anchors are read as slices and not gathered.
_SLICED = 32
# Queries of a cell, and rows of its mask made at a time.
_QUERIES, _ROWS = 64, 1024
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
        if not factor:
            return torch.zeros_like(seen)
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
    """Return the anchors with the largest products, best first, -1 where there are fewer."""
    b, h, n_q, d = q.shape
    # From the farthest on, as the first of equals is taken. Rounded powers could bring the nearest into the window.
    far = [x for x in stripe.distances(k.shape[2])[::-1] if x > stripe.window]
    anchor = torch.full((b, h, n_q, spans), -1, device=q.device)
    if not far:
        return anchor
    sliced = n_q >= _SLICED and not torch.compiler.is_compiling()
    held = len(far) * (1 if sliced else d)
    rows = max(1, min(_CHUNK // max(b * h * held, 1), _TEMPORARY // max(b * h * d, 1) if sliced else n_q))
    distance = torch.tensor(far, dtype=torch.long, device=q.device)
    for low in range(0, n_q, rows):
        some = q[:, :, low : low + rows]
        place = at[low : low + rows, None] + 1 - distance
        if sliced:
            scores = _sliced_scores(some, k, k.shape[2] - n_q + low, far)
        else:
            scores = _gathered_scores(some, k, place)
        if present is not None:
            scores = scores.masked_fill(~present[:, place.clamp(min=0)][:, None], float("-inf"))
        for j in range(min(spans, len(far))):
            best, index = scores.max(dim=-1, keepdim=True)
            found = at[low : low + rows, None] + 1 - distance[index]
            anchor[:, :, low : low + rows, j : j + 1] = torch.where(best == float("-inf"), -1, found)
            scores = scores.scatter_(-1, index, float("-inf"))
    return anchor


def _sliced_scores(q: Tensor, k: Tensor, first: int, far: list[int]) -> Float[Tensor, "b h n_q s"]:
    """Return the products with every anchor, -inf before the first key: consecutive queries have consecutive anchors.

    Query 0 stands at key `first`.
    """
    b, h, n_q, _ = q.shape
    q, k = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2)
    scores = q.new_full((len(far), b, h, n_q), float("-inf"))
    for line, distance in zip(scores, far, strict=True):
        start = max(distance - 1 - first, 0)  # the first query with such an anchor
        if start < n_q:
            keys = k[:, :, :, first + start + 1 - distance : first + n_q + 1 - distance]
            line[:, :, start:] = (q[:, :, :, start:] * keys).sum(-1).flatten(1, 2)
    return scores.permute(1, 2, 3, 0).contiguous()


def _gathered_scores(q: Tensor, k: Tensor, place: Int[Tensor, "n_q s"]) -> Float[Tensor, "b h n_q s"]:
    """Return the products with the anchors at `place`, -inf before the first key."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgnd,bknsd->bkgns", grouped, k[:, :, place.clamp(min=0)]).flatten(1, 2)
    return scores.masked_fill(place < 0, float("-inf"))


def _rows(k: Float[Tensor, "b h_kv n d"], ids: Int[Tensor, "b h n_q s"], heads: int) -> Tensor:
    b, h_kv, n, d = k.shape
    head = torch.arange(heads, device=k.device) // (heads // h_kv)
    first = (torch.arange(b, device=k.device)[:, None] * h_kv + head) * n
    # One index into one line of rows: its gradient is added up row by row, not number by number.
    rows = k.reshape(-1, d).index_select(0, (ids + first[..., None, None]).flatten())
    return rows.view(*ids.shape, d)


def select_spans(found: Spans, n_k: int, stripe: Stripe) -> Selection:
    """Return the selection in which, for head h * k + j, every query sees its span j of head h.

    Queries whose spans begin near one another share a cell, so that keys are read once for up to 64 of them; few
    queries get a cell each.

    Args:
        found: spans of (B, H, N_q, k).
        n_k: number of keys, at whose end the queries stand.
        stripe: bounds the length of spans without looking at them.
    """
    start, end = (x.transpose(2, 3).flatten(1, 2) for x in (found.start, found.end))  # (b, h * k, n_q)
    n_q = start.shape[2]
    longest = stripe.longest(n_k)
    # Half a span: wider buckets fill their cells better, and add more keys to all of them.
    width = max(longest // 2, 16)
    # Buckets without enough queries would leave cells emptier than those of single queries.
    if n_q * width < 8 * n_k or not start.numel():
        return _single_cells(start, end, n_k, stripe)
    return Selection.of_cells([_bucket_cells(start, end, n_k, width, longest)], n_q, n_k)


def _single_cells(start: Tensor, end: Tensor, n_k: int, stripe: Stripe) -> Selection:
    """Return a cell for every query. Queries are cut into parts: early ones have short spans."""
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


def _bucket_cells(start: Tensor, end: Tensor, n_k: int, width: int, longest: int) -> Cells:
    """Return cells of queries whose spans begin within the same `width` keys."""
    (b, h, n_q), device = start.shape, start.device
    buckets = -(-n_k // width)
    # Queries in the order of their buckets, those without a span behind all others.
    bucket = torch.where(start >= 0, start // width, buckets)
    line, order = bucket.contiguous().sort(dim=-1, stable=True)
    edges = torch.arange(buckets + 1, device=device).expand(b, h, -1)
    first = torch.searchsorted(line, edges.contiguous())
    needed = -(-first.diff(dim=-1) // _QUERIES)  # cells of each bucket
    last = needed.cumsum(-1)
    # Reading the count waits for the device; compiled code takes the most there can be.
    count = min(n_q, -(-n_q // _QUERIES) + buckets)
    if not torch.compiler.is_compiling():
        count = max(int(last[..., -1].max()), 1)
    rank = torch.arange(n_q, device=device) - first.gather(-1, line)
    offset = torch.nn.functional.pad(last - needed, (0, 1)).gather(-1, line)
    cell = torch.where(line < buckets, offset + rank // _QUERIES, count)
    slot = cell * _QUERIES + torch.where(line < buckets, rank % _QUERIES, 0)
    # One place more than there are, for what has no span.
    q_ids = torch.full((b, h, (count + 1) * _QUERIES), -1, device=device).scatter_(-1, slot, order)
    q_ids = q_ids[..., :-_QUERIES].unflatten(-1, (count, _QUERIES))
    base = torch.zeros(b, h, count + 1, dtype=torch.long, device=device).scatter_(-1, cell, line * width)
    base = base[..., :-1, None]
    own = q_ids.clamp(min=0).flatten(2)
    low, high = (x.gather(-1, own).view(q_ids.shape) - base for x in (start, end))
    reach = -(-(width + longest) // 8) * 8
    mask = _between(low, high, reach)
    k_ids = base + torch.arange(reach, device=device)
    return cells_of(q_ids, torch.where(k_ids < n_k, k_ids, -1), mask)


def _between(low: Int[Tensor, "..."], high: Int[Tensor, "..."], width: int) -> Bool[Tensor, "... width"]:
    """Return rows that are True from place `low` to place `high`; `width` is a multiple of 8.

    Rows of two triangles are copied, eight places at a time: comparing every place takes several times as long.
    """
    places = torch.arange(width, device=low.device)
    from_low, to_high = (x.view(torch.int64) for x in (places >= places[:, None], places <= places[:, None]))
    rows = torch.empty(low.numel(), width // 8, dtype=torch.int64, device=low.device)
    lows, highs = (x.flatten().clamp(0, width - 1).split(_ROWS) for x in (low, high))
    for some, first, last in zip(rows.split(_ROWS), lows, highs, strict=True):
        torch.bitwise_and(from_low.index_select(0, first), to_high.index_select(0, last), out=some)
    return rows.view(torch.bool).view(*low.shape, width)
