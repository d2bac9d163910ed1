"""Cells of query blocks that see some blocks of keys found for them, the first keys of all, and a window of the last.

Three kinds of keys that do not overlap: sinks at the start of the sequence; what was found between them and the
window; the window, which ends with the query block. What was found differs between heads and query blocks. Sinks and
window do not, so that several query blocks can read them together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from foveate.patterns.cells import Cells, cells_of
from foveate.routing.blocks import block_count
from foveate.routing.tree import Found


class KeptLayout(NamedTuple):
    """Sizes that say where sinks end and windows begin.

    Attributes:
        n_q, n_k: numbers of queries and keys; queries stand at the end of the keys.
        size: keys of a block that was found.
        block_q: queries of a block.
        window: keys before the end of a query block that it sees in any case.
        sink: keys at the start that everybody sees, rounded up to whole blocks.
        whole: whether a query block that reaches beyond the last query has its window end where the whole block
            would, and not with the keys.
    """

    n_q: int
    n_k: int
    size: int
    block_q: int
    window: int
    sink: int
    whole: bool = False

    @property
    def sinks(self) -> int:
        """How many keys everybody sees."""
        return min(block_count(self.sink, self.size) * self.size, self.n_k)

    def found(self, found: Found) -> Cells:
        """Return a cell for every query block with the keys found for it, between sinks and window."""
        starts, size = found.starts, self.size
        device = starts.device
        blocks, slots = starts.shape[2:]
        # There are many ids: what can be said of whole blocks is said of their starts.
        there = (torch.arange(slots, device=device) < found.count[:, None]) & (starts >= self.sinks)
        starts = starts.masked_fill(~there, -size)
        ids = (starts[..., None] + torch.arange(size, device=device)).flatten(3)
        # Blocks reach into the window only where that does not begin between two of them.
        if size > 1 and any(n % size for n in (self.block_q, self.n_q, self.n_k - self.window)):
            ids = ids.masked_fill_(ids >= self._ends(blocks, device) - self.window, -1)
        return cells_of(self._queries(device), ids.clamp_(min=-1), None)

    def near(self, together: int, device: torch.device) -> Cells:
        """Return cells of sinks and window, up to each query, for `together` query blocks at a time."""
        n, window = block_count(block_count(self.n_q, self.block_q), together), self.window
        ends = self._ends(n * together, device).view(n, together, 1)
        near = ends[:, 0] - window + torch.arange(window + (together - 1) * self.block_q, device=device)
        q_ids = self._queries(device)[0, 0]
        q_ids = functional.pad(q_ids, (0, 0, 0, n * together - len(q_ids)), value=-1).view(n, together, -1, 1)
        at = torch.where(q_ids < 0, -1, q_ids + (self.n_k - self.n_q))
        # (cells, query blocks, queries, keys)
        keys, end = near[:, None, None, :], ends.unsqueeze(-1)
        inside = (keys >= end - window) & (keys < end) & (keys <= at)
        first = torch.arange(self.sinks, device=device)
        mask = torch.cat([(first <= at).expand(*inside.shape[:3], -1), inside], dim=-1).flatten(1, 2)
        near = torch.where((near >= self.sinks) & (near < self.n_k), near, -1)
        k_ids = torch.cat([first.expand(n, -1), near], dim=-1)
        return cells_of(q_ids.view(1, 1, n, -1), k_ids[None, None], mask)

    def both(self, found: Found) -> Cells:
        """Return cells of single query blocks with all that they see."""
        cells = self.found(found).beside(self.near(1, found.starts.device))
        if self.window >= self.block_q:
            return cells
        # What was found may lie after some queries of the block.
        return cells.filtered(cells.k_ids[..., None, :] <= cells.q_ids[..., None] + (self.n_k - self.n_q))

    def _ends(self, blocks: int, device: torch.device) -> Int[Tensor, "blocks 1"]:
        """Return the key behind the last that each query block sees."""
        ends = torch.arange(1, blocks + 1, device=device)[:, None] * self.block_q + (self.n_k - self.n_q)
        return ends if self.whole else ends.clamp(max=self.n_k)

    def _queries(self, device: torch.device) -> Int[Tensor, "1 1 blocks block_q"]:
        ids = torch.arange(block_count(self.n_q, self.block_q) * self.block_q, device=device)
        return torch.where(ids < self.n_q, ids, -1).view(1, 1, -1, self.block_q)
