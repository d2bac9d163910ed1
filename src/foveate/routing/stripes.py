"""Stripes: single keys that a run of queries shares, found by how near they come to an anchor.

The anchor of a query is its largest logit over keys that nearly always matter: the first ones and those nearby.
A key further off is worth looking at when its logit comes within `theta` of the anchor, tried with the means of
`block` queries; all keys found by the `step` blocks of a run are seen by the whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.patterns.cells import Cells
from foveate.patterns.pattern import check_int
from foveate.patterns.selection import Selection
from foveate.routing.blocks import block_count, pool_blocks, select_blocks

# Logits that are held at a time, per batch element and head.
_ENTRIES = 1 << 20


class Found(NamedTuple):
    """What some consecutive queries found.

    Attributes:
        start, stop: the queries.
        first: id of the first key that was searched.
        hits: whether each of them was found: by all queries alike, or by each one.
    """

    start: int
    stop: int
    first: int
    hits: Bool[Tensor, "b h rows keys"]


@dataclass(frozen=True)
class StripeRouter:
    """Which keys each run of `block * step` queries looks at. Always causal; sequences of any length.

    Args:
        block: queries that are averaged, and keys of an initial block.
        step: blocks per run.
        theta: how far below the anchor a logit may be, in nats; inf takes every key, -inf none.
        init: initial blocks that everybody sees.
        local: runs that are seen wholly, the query's own included.
        each: whether every query searches for itself, instead of a run's blocks for the whole run.
        official: the bounds of the authors' kernels: everybody sees `init` runs at the start, and what is
            searched begins at the first block and ends one block before the own run.

    Raises:
        ArgumentError: naming the option.
    """

    block: int = 128
    step: int = 16
    theta: float = 12.0
    init: int = 1
    local: int = 1
    each: bool = False
    official: bool = False

    def __post_init__(self):
        for name, least in (("block", 1), ("step", 1), ("init", 0), ("local", 1)):
            check_int(getattr(self, name), name, least)
        if self.theta != self.theta:
            raise bad("theta", self.theta, "a number of nats")

    @property
    def run(self) -> int:
        """Queries of a run."""
        return self.block * self.step

    def near(self, n: int, device: torch.device | None = None) -> Selection:
        """Return the keys of which no search is needed: the initial ones and the local runs."""
        number = torch.arange(block_count(n, self.block), device=device)
        run = number // self.step
        initial = number < self.init * (self.step if self.official else 1)
        table = initial | (run > run[:, None] - self.local)
        return select_blocks(table[None, None], self.block, self.block, n, n, causal=True)

    def anchors(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h_kv n d"], scale: float
    ) -> Float[Tensor, "b h n"]:
        """Return every query's largest logit over `near`, as wide as sums are kept."""
        n, groups, run = q.shape[2], q.shape[1] // max(k.shape[1], 1), self.run
        compute = accumulation_dtype(q.dtype)
        # Rows of a head beside one another once, instead of in every product.
        rows, keys = (q.to(compute) * scale).contiguous(), k.to(compute).contiguous()
        rows, keys = rows.unflatten(1, (-1, groups)), keys.unsqueeze(2)
        first = min(n, self.init * (self.run if self.official else self.block))
        top = rows.new_full(rows.shape[:4], float("-inf"))
        for start in range(0, n, max(1, _ENTRIES // max(first, 1))) if first else ():
            some = slice(start, start + max(1, _ENTRIES // first))
            logits = rows[:, :, :, some] @ keys[:, :, :, :first].transpose(-1, -2)
            if start < first:
                logits.masked_fill_(_future(logits.shape[3], first, start, q.device), float("-inf"))
            top[..., some] = logits.amax(-1)
        # Runs beside one another; what fills the last one up stands behind all its queries.
        rows, keys = (functional.pad(x, (0, 0, 0, -n % run)).unflatten(3, (-1, run)) for x in (rows, keys))
        nearby = functional.pad(top, (0, -n % run)).unflatten(3, (-1, run))
        few = max(1, _ENTRIES // run**2)
        for start in range(0, rows.shape[3], few):
            for back in range(min(self.local, start + few)):
                mine = slice(max(start, back), start + few)
                theirs = slice(mine.start - back, max(min(start + few, rows.shape[3]) - back, 0))
                logits = rows[:, :, :, mine] @ keys[:, :, :, theirs].transpose(-1, -2)
                if not back:
                    logits.masked_fill_(_future(run, run, 0, q.device), float("-inf"))
                nearby[:, :, :, mine] = torch.maximum(nearby[:, :, :, mine], logits.amax(-1))
        return nearby.flatten(3)[..., :n].flatten(1, 2)

    def searched(self, run: int) -> tuple[int, int]:
        """Return the first key that a run searches and the one after the last; none where they cross."""
        if self.official:
            return self.block, run * self.run - self.block
        return self.init * self.block, (run - self.local + 1) * self.run

    def search(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h_kv n d"],
        anchors: Float[Tensor, "b h n"],
        scale: float,
    ) -> Iterator[Found]:
        """Yield what is found, a run (or, with `each`, a block) of queries at a time."""
        n, groups = q.shape[2], q.shape[1] // max(k.shape[1], 1)
        compute = accumulation_dtype(q.dtype)
        keys = k.to(compute).transpose(-1, -2)
        rows, limits = q.to(compute) * scale, anchors.to(compute)[..., None]
        if not self.each:
            rows, limits = pool_blocks(rows, self.block), pool_blocks(limits, self.block)
        stride = self.block if self.each else self.run
        for start in range(0, n, stride):
            first, last = self.searched(start // self.run)
            if first >= last:
                continue
            stop = min(start + stride, n)
            mine = (
                slice(start, stop) if self.each else slice(start // self.block, block_count(stop, self.block))
            )
            part = rows[:, :, mine].unflatten(1, (-1, groups))
            logits = (part @ keys[:, :, None, :, first:last]).flatten(1, 2)
            hits = logits + self.theta >= limits[:, :, mine]
            yield Found(start, stop, first, hits if self.each else hits.any(2, keepdim=True))

    def coordinates(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h_kv n d"],
        anchors: Float[Tensor, "b h n"],
        scale: float,
    ) -> tuple[Int[Tensor, "b h runs n"], Int[Tensor, "b h runs 1"]]:
        """Return the found keys of every run, ascending with zeros behind them, and how many they are."""
        b, h, n, _ = q.shape
        ids = torch.zeros(b, h, block_count(n, self.run), n, dtype=torch.long, device=q.device)
        counts = ids.new_zeros(b, h, ids.shape[2], 1)
        if self.each:
            raise bad(
                "each", True, "False for keys of runs", "With it, queries of a run find different keys."
            )
        for found in self.search(q, k, anchors, scale):
            front, count = _front(found.hits[:, :, 0])
            run = found.start // self.run
            there = torch.arange(front.shape[-1], device=q.device) < count[..., None]
            ids[:, :, run, : front.shape[-1]] = torch.where(there, front + found.first, 0)
            counts[:, :, run, 0] = count
        return ids, counts

    def select(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h_kv n d"],
        anchors: Float[Tensor, "b h n"],
        scale: float,
    ) -> Selection:
        """Return the selection of what is found. No key of it is in `near`, unless `official` says so."""
        cells = [_cell(found, self.each) for found in self.search(q, k, anchors, scale)]
        nothing = torch.full((1, 1, 1, 1), -1, device=q.device)
        packed = _packed([cell for cell in cells if cell.k_ids.shape[3]])
        return Selection.of_cells(packed or [Cells(nothing, nothing)], q.shape[2], k.shape[2])


def _future(rows: int, keys: int, start: int, device: torch.device) -> Bool[Tensor, "rows keys"]:
    """Say which of the first keys come after which of the queries from `start` on."""
    at = torch.arange(start, start + rows, device=device)[:, None]
    return torch.arange(keys, device=device) > at


def _front(hits: Bool[Tensor, "*lead keys"]) -> tuple[Int[Tensor, "*lead width"], Int[Tensor, "*lead"]]:
    """Return the places of the hits, ascending, as wide as the most there are; and how many each row has."""
    count = hits.float().sum(-1).long()  # sums of floats are quick, and exact for fewer than 2^24 keys
    width = int(count.max()) if count.numel() else 0
    return (~hits).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width], count


def _cell(found: Found, each: bool) -> Cells:
    """Make one cell of what some queries found, over the keys that any of them did."""
    front, count = _front(found.hits.any(2))
    there = torch.arange(front.shape[-1], device=front.device) < count[..., None]
    k_ids = torch.where(there, front + found.first, -1)[:, :, None]
    q_ids = torch.arange(found.start, found.stop, device=front.device).view(1, 1, 1, -1)
    columns = front[:, :, None].expand(-1, -1, found.hits.shape[2], -1)
    mask = found.hits.gather(3, columns)[:, :, None] if each else None
    return Cells(q_ids.expand(*k_ids.shape[:2], 1, -1), k_ids, mask)


def _packed(cells: list[Cells]) -> list[Cells]:
    """Put cells of about the same width into one shape."""
    cells = sorted(cells, key=lambda cell: -cell.k_ids.shape[3])
    packed, first = [], 0
    while first < len(cells):
        width, last = cells[first].k_ids.shape[3], first
        while last < len(cells) and 3 * cells[last].k_ids.shape[3] > 2 * width:
            last += 1
        packed.append(_joined(cells[first:last], width))
        first = last
    return packed


def _joined(cells: list[Cells], width: int) -> Cells:
    tall = max(cell.q_ids.shape[3] for cell in cells)
    down = [tall - cell.q_ids.shape[3] for cell in cells]
    right = [width - cell.k_ids.shape[3] for cell in cells]
    q_ids = [functional.pad(c.q_ids, (0, d), value=-1) for c, d in zip(cells, down, strict=True)]
    k_ids = [functional.pad(c.k_ids, (0, r), value=-1) for c, r in zip(cells, right, strict=True)]
    masks = [
        functional.pad(c.mask, (0, r, 0, d))
        for c, r, d in zip(cells, right, down, strict=True)
        if c.mask is not None
    ]
    return Cells(torch.cat(q_ids, 2), torch.cat(k_ids, 2), torch.cat(masks, 2) if masks else None)
