"""`Segments`: packed sequences. Tokens attend to the tokens of their own segment."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.patterns.cells import Cells
from foveate.patterns.pattern import Pattern
from foveate.patterns.selection import Selection

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Queries of a cell once a pattern narrows a segment down; near the default tiles of one-dimensional patterns.
_TILE = 64


class Segments(Selection):
    """Tokens of one batch row that carry the same segment id attend to one another.

    Segments may have any lengths and need not be contiguous. A negative id is padding: it attends to nothing
    and nothing attends to it. Positions stay global token indices: `Segments(ids) & Causal()` is the packed
    causal case, and so is every other pattern that looks at differences of positions, as long as segments
    are contiguous.

    Segments of similar length (up to the next power of two) share cells of one shape. Making them reads
    lengths from the device once; do it outside of a compiled region.

    Args:
        q_ids: (B or 1, N_q) integers, the segment of each query.
        k_ids: (B or 1, N_k) integers, the segment of each key; `q_ids` when left out.

    Raises:
        ArgumentError: naming the argument whose shape, dtype or device is wrong.
    """

    def __init__(self, q_ids: Int[Tensor, "#b n_q"], k_ids: Int[Tensor, "#b n_k"] | None = None):
        k_ids = q_ids if k_ids is None else k_ids
        for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _INTEGERS:
                got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else ids
                raise bad(name, got, "an integer tensor (B or 1, N), one segment id per token")
        if q_ids.device != k_ids.device:
            raise bad("k_ids", str(k_ids.device), f"a tensor on {q_ids.device}, where q_ids is")
        try:
            batch = torch.broadcast_shapes(q_ids.shape[:1], k_ids.shape[:1])[0]
        except RuntimeError:
            raise bad("k_ids", tuple(k_ids.shape), f"{len(q_ids)} rows, as q_ids has") from None
        q_ids, k_ids = q_ids.long().expand(batch, -1), k_ids.long().expand(batch, -1)
        self._set(_segment_cells(q_ids, k_ids), q_ids.shape[1], k_ids.shape[1], "lse")

    def __and__(self, other: object) -> Selection:
        """Keep the pairs that `other` has too; long segments are cut into tiles, which see fewer keys."""
        kept = super().__and__(other)
        return kept.tiled(_TILE) if isinstance(other, Pattern) else kept

    __rand__ = __and__


def _segment_cells(q_ids: Tensor, k_ids: Tensor) -> tuple[Cells, ...]:
    """Gather each segment into a cell. Loops over classes of lengths only, never over tokens."""
    batch, device = q_ids.shape[0], q_ids.device
    # One number per (batch row, segment id), in order of rows.
    both = torch.cat([q_ids, k_ids], dim=1)
    ids, rank = torch.unique(both, return_inverse=True)
    rank = rank.view_as(both) + torch.arange(batch, device=device)[:, None] * max(len(ids), 1)
    labels, segment = torch.unique(rank, return_inverse=True)
    row = labels // max(len(ids), 1)
    sides = [
        _Side(ids_, of, len(labels))
        for ids_, of in zip(
            (q_ids, k_ids), segment.split([q_ids.shape[1], k_ids.shape[1]], dim=1), strict=True
        )
    ]
    alive = (sides[0].count > 0) & (sides[1].count > 0)
    powers = 1 << torch.arange(40, device=device)
    kind = torch.bucketize(sides[0].count, powers) * 64 + torch.bucketize(sides[1].count, powers)
    cells = []
    for which in torch.unique(kind[alive]).tolist():
        members = (alive & (kind == which)).nonzero().flatten()
        per_row = torch.bincount(row[members], minlength=batch)
        before = per_row.cumsum(0) - per_row
        slot = torch.full_like(labels, -1)
        slot[members] = torch.arange(len(members), device=device) - before[row[members]]
        n_cells = int(per_row.max())
        cells.append(Cells(*(side.table(slot, members, batch, n_cells) for side in sides)))
    nothing = torch.full((batch, 1, 1, 1), -1, device=device)
    return tuple(cells) or (Cells(nothing, nothing),)


class _Side:
    """The tokens of queries or of keys, sorted by segment."""

    def __init__(self, ids: Tensor, segment: Tensor, n_segments: int):
        row, token = (ids >= 0).nonzero(as_tuple=True)
        of = segment[row, token]
        order = of.argsort(stable=True)
        self.row, self.token, self.segment = row[order], token[order], of[order]
        self.count = torch.bincount(of, minlength=n_segments)
        first = self.count.cumsum(0) - self.count
        self.position = torch.arange(len(of), device=ids.device) - first[self.segment]

    def table(self, slot: Tensor, members: Tensor, batch: int, n_cells: int) -> Tensor:
        """Return (batch, 1, n_cells, longest) token ids of the member segments, -1 where one is shorter."""
        width = int(self.count[members].max())
        out = torch.full((batch, 1, n_cells, width), -1, device=slot.device)
        at = slot[self.segment]
        ours = at >= 0
        out[self.row[ours], 0, at[ours], self.position[ours]] = self.token[ours]
        return out
