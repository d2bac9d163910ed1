"""`PowerBlocks`: causal attention to sinks, to a window of blocks, and to blocks at power-of-two distances."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.pattern import Pattern, check_int

# Smaller blocks are not worth a cell of their own: they are lowered in tiles of several.
_SMALLEST_CELL = 16


class PowerBlocks(Pattern):
    """Each query sees the first blocks, its latest ones, and those 1, 2, 4, 8, ... blocks back; never later keys.

    PowerAttention (arXiv 2503.03588). A block has O(log N) blocks of keys, and every earlier block is reached
    in as many layers as its distance has ones in binary. Query i stands at key position n_k - n_q + i, as in
    `Causal()`; blocks are counted from the first key.

    Args:
        block: tokens of a block, >= 1.
        window: the latest blocks that are seen whole, the query's own included, >= 1.
        sinks: the first blocks of the sequence that everyone sees, >= 0.

    Raises:
        ArgumentError: naming the argument that is not such an integer.
    """

    fields = ("block", "window", "sinks")
    block: int
    window: int
    sinks: int

    def __init__(self, block: int, window: int = 1, sinks: int = 1):
        self._store(
            block=check_int(block, "block", 1),
            window=check_int(window, "window", 1),
            sinks=check_int(sinks, "sinks", 0),
        )

    def allowed(
        self, q: Int[Tensor, "..."], k: Int[Tensor, "..."], n_q: int, n_k: int
    ) -> Bool[Tensor, "..."]:
        """Say `k <= position`, and that the distance in blocks is small or a power of two, or `k` a sink."""
        position = q + (n_k - n_q)
        distance = position // self.block - k // self.block
        # Negative distances pass the bit trick by chance; they are later keys, which are left out anyway.
        power = (distance & (distance - 1)) == 0
        return (k <= position) & (power | (distance < self.window) | (k < self.sinks * self.block))

    def key_blocks(self, block: int) -> list[int]:
        """Return the blocks that block number `block` sees, ascending; the last is `block` itself."""
        seen = set(range(min(self.sinks, block + 1)))
        seen.update(range(max(0, block - self.window + 1), block + 1))
        power = 1
        while power <= block:
            seen.add(block - power)
            power *= 2
        return sorted(seen)

    def candidates(self, q_ids: Int[Tensor, "t"], n_q: int, n_k: int) -> Int[Tensor, "m"]:
        """Return the keys of all blocks that these queries see, up to the last query."""
        positions = q_ids.cpu() + (n_k - n_q)
        positions = positions[positions >= 0]
        if not positions.numel():
            return positions
        blocks = (positions // self.block).unique().tolist()
        seen = torch.tensor(sorted({b for block in blocks for b in self.key_blocks(block)}))
        keys = (seen[:, None] * self.block + torch.arange(self.block)).flatten()
        return keys[keys <= positions.max()]

    @property
    def own_block(self) -> int | None:
        """The block, where it is large enough for cells of its own."""
        return self.block if self.block >= _SMALLEST_CELL else None

    def own_groups(self, n_q: int, n_k: int) -> tuple[ExplicitGroup, ...]:
        """Return one cell per block of queries; cells with equally many blocks of keys share one small mask."""
        shapes = defaultdict(list)
        first = max(n_k - n_q, 0)
        for block in range(first // self.block, -(-n_k // self.block)):
            low, high = max(first, block * self.block), min(n_k, (block + 1) * self.block)
            keys = self.key_blocks(block)
            shapes[low % self.block, high - low, len(keys)].append((low, keys))
        groups = []
        for (_, height, _), cells in shapes.items():
            low = torch.tensor([row for row, _ in cells])
            queries = low[:, None] - (n_k - n_q) + torch.arange(height)
            starts = torch.tensor([blocks for _, blocks in cells]) * self.block
            keys = (starts[..., None] + torch.arange(self.block)).flatten(1)
            # The query's own block comes last; nobody here sees beyond the last query.
            width = keys.shape[1] - self.block + int(low[0] % self.block) + height
            keys = keys[:, :width].contiguous()
            mask = torch.ones(height, width, dtype=torch.bool).tril(width - height)
            groups.append(ExplicitGroup(queries[None, None], keys[None, None], mask[None, None, None]))
        return tuple(groups)
