"""One axis of a pattern: `LocalAxis` says which keys a position sees, `AxisRule` tabulates it.

Every grid pattern is a product over axes, and every axis is the same small thing: positions are dealt into
`dilation` interleaved groups, inside a group `group` consecutive positions share one window of `size` keys,
and a border policy says what happens where the window would leave the axis:

    g = i % dilation                   the dilation group, of length  Lg = ceil((L - g) / dilation)
    p = i // dilation                  the position in it
    a = origin + group * floor((p - origin) / group) + offset          first key of the window, in the group
    clamp:  a = clamp(a, 0, Lg - size)       the window is moved inside
    mask:   keys outside [0, Lg) do not exist
    zero:   keys outside [0, Lg) are phantoms: zeros with real coordinates (`LocalAxis.padded_rule`)

Sources: the windows of neighborhood attention (arXiv 2504.16922; there `offset = stride//2 - window//2`, and
`stride - window` when causal), Swin (2103.14030), HaloNet (2103.12731) and MaxViT's grid (2204.01697).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Border = Literal["clamp", "mask", "zero"]
BORDERS: tuple[Border, ...] = ("clamp", "mask", "zero")


@dataclass(frozen=True)
class LocalAxis:
    """The keys of each position along one axis, by the formula at the top of this file.

    Attributes:
        size: keys of a whole window.
        offset: first key of the window, relative to the first position of its group of queries.
        group: consecutive positions (of one dilation group) that share a window.
        dilation: distance between neighbouring keys of a window.
        origin: where the groups of queries start to be counted (the shift of Swin's windows).
        border: what happens where the window leaves the axis.
        causal: drop the keys after the query.
    """

    size: int
    offset: int
    group: int = 1
    dilation: int = 1
    origin: int = 0
    border: Border = "mask"
    causal: bool = False

    def span(
        self, i: Int[Tensor, "..."], length: int
    ) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]]:
        """Return `(g, first, stop)` of positions `i`: the dilation group, and the range of keys in it.

        Only elementwise arithmetic, so that it works under vmap and inside FlexAttention. `first` and `stop`
        may lie outside the group where the border policy is not "clamp".
        """
        # Integer division is slow: a million positions without dilation or groups should not pay for it.
        g, p = (torch.zeros_like(i), i) if self.dilation == 1 else (i % self.dilation, i // self.dilation)
        first = p + self.offset
        if self.group > 1:
            first = (p - self.origin) // self.group * self.group + (self.origin + self.offset)
        if self.border == "clamp":
            first = torch.minimum(first, self._group_length(g, length) - self.size).clamp(min=0)
        stop = first + self.size
        if self.causal:
            stop = torch.minimum(stop, p + 1)
        return g, first, stop

    def _group_length(self, g: Tensor, length: int) -> Tensor:
        last = length - 1 - g
        return (last if self.dilation == 1 else last // self.dilation) + 1

    def allowed(self, i: Int[Tensor, "..."], j: Int[Tensor, "..."], length: int) -> Bool[Tensor, "..."]:
        """Say elementwise whether position `i` sees key `j` on an axis of `length` keys (broadcasting)."""
        g, first, stop = self.span(i, length)
        t = j if self.dilation == 1 else j // self.dilation
        seen = (first <= t) & (t < stop)
        return seen if self.dilation == 1 else seen & (j % self.dilation == g)

    def rule(self, n_q: int, n_k: int, shift: int = 0) -> AxisRule:
        """Tabulate the real keys of positions `shift .. shift + n_q - 1` on an axis of `n_k` keys."""
        g, first, stop = self.span(torch.arange(shift, shift + n_q), n_k)
        length = self._group_length(g, n_k).clamp(min=0)
        first = torch.minimum(first.clamp(min=0), length)
        stop = torch.maximum(torch.minimum(stop, length), first)
        phase = shift % self.dilation
        return AxisRule(n_q, n_k, g + self.dilation * first, stop - first, self.dilation, phase)

    def padding(self, length: int) -> tuple[int, int]:
        """Return how many phantom keys stand before and after an axis of `length` keys (border "zero")."""
        if self.border != "zero" or length == 0:
            return 0, 0
        g, first, stop = self.span(torch.arange(length), length)
        lowest = int((g + self.dilation * first).min())
        highest = int((g + self.dilation * (stop - 1)).max())
        return max(0, -lowest), max(0, highest - (length - 1))

    def padded_rule(self, length: int) -> AxisRule:
        """Tabulate all keys, phantoms included, as positions on the axis that `padding` lengthened."""
        low, high = self.padding(length)
        g, first, stop = self.span(torch.arange(length), length)
        start = g + self.dilation * first + low
        return AxisRule(length, low + length + high, start, stop - first, self.dilation, low % self.dilation)


@dataclass(frozen=True, eq=False)
class AxisRule:
    """The keys of each query position along one axis: `start[i] + step * t` for `t < count[i]`.

    Invariants, which make transposes arithmetic progressions too:
    `start[i] % step == (i + phase) % step`; among queries of equal `i % step`, `start` and
    `stop = start + step * count` never decrease; every key lies in `[0, n_k)`.

    Attributes:
        n_q: query positions on the axis.
        n_k: key positions on the axis.
        start: (n_q,) int64, the first key.
        count: (n_q,) int64, how many keys.
        step: distance between consecutive keys of a query, and of consecutive queries of a class.
        phase: how far keys are displaced against queries, modulo `step` (0 unless the key axis is padded).
    """

    n_q: int
    n_k: int
    start: Int[Tensor, "n_q"]
    count: Int[Tensor, "n_q"]
    step: int = 1
    phase: int = 0

    @classmethod
    def full(cls, n_q: int, n_k: int) -> AxisRule:
        """Let every query see every key."""
        return cls.prefix(torch.full((n_q,), n_k), n_k)

    @classmethod
    def causal(cls, n_q: int, n_k: int, shift: int) -> AxisRule:
        """Let query `i` see the keys up to and including `i + shift`."""
        return cls.prefix(torch.arange(n_q) + (shift + 1), n_k)

    @classmethod
    def prefix(cls, count: Int[Tensor, "n_q"], n_k: int) -> AxisRule:
        """Let query `i` see the first `count[i]` keys (never decreasing; clipped to what exists)."""
        return cls(len(count), n_k, torch.zeros_like(count), count.clamp(0, n_k))

    @property
    def stop(self) -> Int[Tensor, "n_q"]:
        """One step past the last key of each query."""
        return self.start + self.step * self.count

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs the axis has."""
        return int(self.count.sum())

    def dense(self) -> Bool[Tensor, "n_q n_k"]:
        """Expand to a boolean matrix (for tests and small pictures)."""
        j = torch.arange(self.n_k)
        inside = (self.start[:, None] <= j) & (j < self.stop[:, None])
        return inside & ((j - self.start[:, None]) % self.step == 0)

    def keys_of(self, positions: Int[Tensor, "p"]) -> Int[Tensor, "m"]:
        """Return the sorted union of the keys of some queries, in O(positions + range of the keys)."""
        some = positions[self.count[positions] > 0]
        if some.numel() == 0:
            return some
        start, stop = self.start[some], self.stop[some]
        base = int(start.min()) // self.step * self.step
        rows = -(-(int(stop.max()) - base) // self.step) + 1
        edges = torch.zeros(rows * self.step, dtype=torch.long)
        # A walk along each residue class: +1 where a progression starts, -1 one step after it ends.
        ones = torch.ones_like(some)
        edges.index_add_(0, start - base, ones)
        edges.index_add_(0, stop - base, -ones)
        open_ = edges.view(rows, self.step).cumsum(0).view(-1)
        return open_.nonzero().flatten() + base

    def intersect(self, other: AxisRule) -> AxisRule | None:
        """Return the rule of the keys both have, or None when that is no single progression of this kind.

        Rules of equal step and phase meet, and so does any rule with one of step 1.
        """
        if (self.n_q, self.n_k) != (other.n_q, other.n_k):
            return None
        wide, fine = (self, other) if self.step >= other.step else (other, self)
        if fine.step != 1 and (fine.step, fine.phase) != (wide.step, wide.phase):
            return None
        step = wide.step
        skipped = torch.clamp(-((wide.start - fine.start) // step), min=0)
        start = wide.start + step * skipped
        stop = torch.minimum(wide.stop, fine.stop)
        count = torch.clamp(-((start - stop) // step), min=0)
        return AxisRule(self.n_q, self.n_k, start, count, step, wide.phase)

    def transpose(self) -> AxisRule:
        """Return the queries of each key as a rule over keys."""
        step, n_q, n_k = self.step, self.n_q, self.n_k
        i, j = torch.arange(n_q), torch.arange(n_k)
        # Class-major order, and one sorted number line for all classes, so that one search serves them all.
        order = torch.argsort(i % step, stable=True)
        sizes = torch.bincount(i % step, minlength=step)
        base = sizes.cumsum(0) - sizes
        far = n_k + 2 * step
        line = (order % step) * far
        of_key = (j - self.phase) % step
        sought = of_key * far + j
        begun = torch.searchsorted(line + self.start[order], sought, right=True) - base[of_key]
        ended = torch.searchsorted(line + self.stop[order], sought, right=True) - base[of_key]
        count = torch.clamp(begun - ended, min=0)
        return AxisRule(n_k, n_q, of_key + step * ended, count, step, -self.phase % step)
