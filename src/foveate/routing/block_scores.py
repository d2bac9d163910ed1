"""Scores of key blocks for query blocks: all of them in a table, or some that are looked up.

The score of a block is the largest product of any row of the query block with any unit of the key block. Units are
keys, or the minimum and maximum of several keys, whichever fits better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from foveate.routing.blocks import block_count

# Numbers gathered or kept in a table at a time, and products of a table taken at once.
_CHUNK, _PRODUCTS = 1 << 22, 1 << 20
# Rows of queries that share a table, and how many products of a row take as long as reading a key.
_ROWS, _READ = 256, 14
_NEVER = float("-inf")


class Part(NamedTuple):
    """Some query blocks, and what they ask of which units.

    Attributes:
        asked: rows of the query blocks (B, H, blocks, rows, D).
        absent: rows that ask nothing (blocks, rows), None for none.
        units: (B, H_kv, units, width).
        visible: (blocks,) how many units each query block may see.
        block_k: units of a key block.
        paired: whether a unit is a minimum and a maximum, side by side.
        most: key blocks that any of the query blocks may choose from.
    """

    asked: Tensor
    absent: Tensor | None
    units: Tensor
    visible: Tensor
    block_k: int
    paired: bool
    most: int


class AskedBlocks:
    """What query blocks ask of which units, cut into parts that are scored in the cheaper of two ways.

    Looking up a representative copies its keys; a table of all scores takes more products, but is one product of
    matrices. Which is cheaper depends on how many representatives there are to look up.
    """

    def __init__(
        self,
        asked: Tensor,
        absent: Tensor | None,
        units: Tensor,
        visible: list[int],
        counts: list[int],
        block_k: int,
        paired: bool,
    ):
        self.asked, self.absent, self.units = asked, absent, units
        self.visible, self.counts, self.block_k, self.paired = visible, counts, block_k, paired

    def parts(
        self, looked_up: Callable[[int], int] | None
    ) -> Iterator[tuple[Table | Lookup, Int[Tensor, "q_blocks"]]]:
        """Yield query blocks in order: those that score, and how many blocks of keys each may choose from.

        Args:
            looked_up: how many blocks are looked up, given the most that a query block may choose from; None for
                tables only.
        """
        b, h, n, rows, _ = self.asked.shape
        first = 0
        while first < n:
            fits = _CHUNK // max(b * h * block_count(self.visible[first], self.block_k), 1)
            last = min(first + max(min(_ROWS // max(rows, 1), fits), 1), n)
            # A table reads its keys once for all of these query blocks.
            whole = self.visible[last - 1] * (_READ / (last - first) + rows)
            if looked_up is not None:
                some = looked_up(self.counts[last - 1]) * self.block_k * (_READ + rows)
                if whole > some:
                    break
            yield self._part(first, last, Table)
            first = last
        if first < n:  # later ones see more keys still
            yield self._part(first, n, Lookup)

    def _part(self, first: int, last: int, kind: type) -> tuple[Table | Lookup, Tensor]:
        device = self.asked.device
        absent = None if self.absent is None else self.absent[first:last]
        visible = torch.tensor(self.visible[first:last], device=device)
        units = self.units[:, :, : self.visible[last - 1]]
        asked, most = self.asked[:, :, first:last], self.counts[last - 1]
        scorer = kind(Part(asked, absent, units, visible, self.block_k, self.paired, most))
        return scorer, torch.tensor(self.counts[first:last], device=device)


class Table:
    """Scores of all key blocks for some query blocks: of any row and any key the best product."""

    def __init__(self, part: Part):
        asked, absent, units, visible, block_k, paired, self.most = part
        b, h, c, rows, d = asked.shape
        self.lead = asked.shape[:2]
        n, sides = block_count(units.shape[2], block_k), 1 + paired
        units = functional.pad(units, (0, 0, 0, n * block_k - units.shape[2]))
        # The first of any place in a block, then the second, ...: maxima are then taken over whole lines.
        units = units.unflatten(2, (n, block_k)).unflatten(4, (sides, d)).permute(0, 1, 3, 4, 2, 5)
        flat = asked.unflatten(1, (units.shape[1], -1)).flatten(2, 4)
        self.scores = asked.new_empty(b, h, c, n)
        first_unit = torch.arange(block_k, device=units.device)[:, None]
        # All keys before the first query's end are seen by all; a traced call does not look, and masks them too.
        least = 0 if torch.compiler.is_compiling() else int(visible[0])
        strip = max(1, _PRODUCTS // max(b * h * c * rows * block_k * sides, 1))
        for at in range(0, n, strip):
            some = units[:, :, :, :, at : at + strip]
            keys = some.reshape(*flat.shape[:2], block_k * sides * some.shape[4], d)
            products = flat @ keys.transpose(-1, -2)
            products = products.view(b, h, c, rows, block_k, sides, some.shape[4])
            if absent is not None:
                products = products.masked_fill(absent[..., None, None, None], _NEVER)
            best = products.amax((3, 5))
            if (at + strip) * block_k > least:
                unit = torch.arange(at, at + best.shape[-1], device=units.device) * block_k + first_unit
                best = best.masked_fill(unit >= visible[:, None, None], _NEVER)
            self.scores[..., at : at + strip] = best.amax(3)

    def of(self, blocks: Int[Tensor, "b h q_blocks m"]) -> Float[Tensor, "b h q_blocks m"]:
        """Return the scores of blocks, -inf for blocks that have no visible unit."""
        return self.scores.gather(-1, blocks)

    def best(
        self, first: Int[Tensor, "b h q_blocks m"], size: Int[Tensor, "b h q_blocks m"]
    ) -> Float[Tensor, "b h q_blocks m"]:
        """Return the best score of any block of the segments."""
        n = self.scores.shape[-1]
        table = functional.pad(self.scores, (0, 1), value=_NEVER)
        out = torch.full(first.shape, _NEVER, dtype=table.dtype, device=first.device)
        for shift in range(int(size.max()) if size.numel() else 0):
            at = torch.where(shift < size, first + shift, n).clamp(max=n)
            out = torch.maximum(out, table.gather(-1, at))
        return out


class Lookup:
    """Scores single key blocks for query blocks, by the best product of any of their rows."""

    def __init__(self, part: Part):
        asked, absent, units, visible, block_k, paired, self.most = part
        self.asked, self.visible, self.block_k, self.paired = asked, visible, block_k, paired
        self.lead = asked.shape[:2]
        self.absent = None if absent is None else absent[:, :, None]
        # One line per block: its units side by side.
        b, h_kv, n, width = units.shape
        self.blocks = block_count(n, block_k)
        lines = functional.pad(units, (0, 0, 0, self.blocks * block_k - n)).reshape(-1, block_k * width)
        self.lines, self.width = lines, width
        heads = torch.arange(asked.shape[1], device=units.device) // (asked.shape[1] // h_kv)
        batch = torch.arange(b, device=units.device)[:, None] * h_kv
        self.first = ((batch + heads) * self.blocks)[:, :, None, None]

    def of(self, blocks: Int[Tensor, "b h q_blocks m"]) -> Float[Tensor, "b h q_blocks m"]:
        """Return the scores of blocks, -inf for blocks that have no visible unit."""
        b, h, _, m = blocks.shape
        step = max(1, _CHUNK // max(b * h * m * self.lines.shape[1], 1))
        parts = [self._chunk(blocks[:, :, at : at + step], at) for at in range(0, blocks.shape[2], step)]
        return torch.cat(parts, dim=2)

    def _chunk(self, blocks: Tensor, at: int) -> Tensor:
        b, h, c, m = blocks.shape
        keys = self.lines.index_select(0, (blocks + self.first).flatten())
        keys = keys.view(b, h, c, m * self.block_k, self.width)
        asked = self.asked[:, :, at : at + c]
        sides = keys.chunk(2, dim=-1) if self.paired else [keys]
        best = None
        for side in sides:
            products = asked @ side.transpose(-1, -2)
            best = products if best is None else torch.maximum(best, products)
        assert best is not None
        if self.absent is not None:
            best = best.masked_fill(self.absent[at : at + c], _NEVER)
        best = (best.squeeze(-2) if best.shape[-2] == 1 else best.amax(-2)).view(b, h, c, m, self.block_k)
        # Only the last block that a query block sees may have units that it does not.
        left = self.visible[at : at + c, None] - blocks * self.block_k
        there = torch.arange(self.block_k, device=blocks.device) < left[..., None]
        return best.masked_fill(~there, _NEVER).amax(-1)
