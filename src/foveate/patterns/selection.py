"""`Selection`: who may attend to whom, chosen from content, per batch element and head.

A selection is a list of cells: `tq` queries that all attend to `tk` keys, less what a mask takes away. The
algebra works on the pairs inside the cells, so that memory goes with them and not with N x N (`~` excepted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import bad
from foveate.core.lazy import cached_property
from foveate.patterns.cells import Cells, cells_of
from foveate.patterns.compose import refuse_phantoms
from foveate.patterns.lower import lower
from foveate.patterns.pattern import Pattern, check_int, check_length
from foveate.patterns.schedule import Combine, Schedule


class Selection:
    """Cells of queries and keys, possibly different for each batch element and head.

    Where pairs are combined by log-sum-exp (`combine="lse"`) each (query, key) pair should occur once;
    `distinct()` sees to that, `schedule.validate()` checks it.

    `&`, `|` and `~` work with selections, patterns and schedules and return a Selection. `&` takes pairs
    away and keeps the cells; `|` appends cells and counts no pair twice; `~` costs N_q x N_k. `|` and `~`
    need combine="lse": where queries meet keys several times on purpose there is no set to speak of.

    Args:
        q_ids: (B or 1, H or 1, C, tq) int64 query ids; -1 is no query.
        k_ids: (B or 1, H or 1, C, tk) int64 key ids; -1 is no key.
        mask: bool, broadcastable to (B, H, C, tq, tk); True means "may attend".
        n_q: number of queries.
        n_k: number of keys.
        combine: how the cells a query stands in combine: "lse", "sum", or a combine rule of `schedule`.

    Raises:
        ArgumentError: naming the argument whose shape or dtype is wrong. Ids are not read here (that
            would wait for the device): `schedule.validate()` does.
    """

    cells: tuple[Cells, ...]
    n_q: int
    n_k: int
    combine: Combine

    def __init__(
        self,
        q_ids: Int[Tensor, "#b #h c tq"],
        k_ids: Int[Tensor, "#b #h c tk"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        n_q: int,
        n_k: int,
        combine: Combine = "lse",
    ):
        for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
            if not isinstance(ids, Tensor) or ids.dim() != 4 or ids.dtype != torch.int64:
                raise bad(name, _describe(ids), "an int64 tensor (B or 1, H or 1, cells, ids)")
        if q_ids.shape[2] != k_ids.shape[2]:
            raise bad("k_ids", _describe(k_ids), f"{q_ids.shape[2]} cells, as q_ids has")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise bad("mask", _describe(mask), "a boolean tensor", "True means 'may attend'.")
        check_length(n_q, "n_q")
        check_length(n_k, "n_k")
        try:
            cells = cells_of(q_ids, k_ids, mask)
        except RuntimeError:
            shapes = [tuple(t.shape) for t in (q_ids, k_ids, mask) if t is not None]
            raise bad(
                "q_ids, k_ids, mask", shapes, "shapes that broadcast to (B, H, cells, tq, tk)"
            ) from None
        self._set((cells,), n_q, n_k, combine)

    def _set(self, cells: tuple[Cells, ...], n_q: int, n_k: int, combine: Combine) -> None:
        self.cells, self.n_q, self.n_k, self.combine = cells, n_q, n_k, combine

    @classmethod
    def of_cells(cls, cells: Sequence[Cells], n_q: int, n_k: int, combine: Combine = "lse") -> Selection:
        """Make a selection of cells of several shapes."""
        new = Selection.__new__(Selection)
        new._set(tuple(cells), n_q, n_k, combine)
        return new

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> Selection:
        """Make a selection with the cells of a schedule."""
        cells = [cells_of(group.q_ids(), group.k_ids(), group.mask()) for group in schedule.groups]
        return cls.of_cells(cells, schedule.n_q, schedule.n_k, schedule.combine)

    @classmethod
    def of_pattern(cls, pattern: Pattern, n_q: int, n_k: int) -> Selection:
        """Make a selection of the cells a pattern lowers to."""
        refuse_phantoms(pattern, "made a Selection")
        return cls.of_schedule(lower(pattern, n_q, n_k))

    @cached_property
    def schedule(self) -> Schedule:
        """The cells as a Schedule."""
        groups = tuple(cell.group() for cell in self.cells)
        return Schedule(self.n_q, self.n_k, groups, self.combine)

    @property
    def batch(self) -> tuple[int, int]:
        """(batch elements, heads) the cells tell apart; 1 where they share."""
        b, h = torch.broadcast_shapes((1, 1), *(cell.q_ids.shape[:2] for cell in self.cells))
        return b, h

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self.cells[0].q_ids.device if self.cells else torch.device("cpu")

    def to(self, device: torch.device | str) -> Selection:
        """Return the selection with its tensors on `device`."""
        return self._with([cell.to(device) for cell in self.cells])

    def check(self, n_q: int, n_k: int) -> None:
        """Raise an ArgumentError unless the selection was made for these lengths."""
        for name, got, made in (("n_q", n_q, self.n_q), ("n_k", n_k, self.n_k)):
            if got != made:
                raise bad(name, got, f"{made}, for which the selection was made")

    def dense(self) -> Bool[Tensor, "b h n_q n_k"]:
        """Return the mask as booleans (B or 1, H or 1, N_q, N_k): pairs that stand in some cell."""
        b, h = self.batch
        # The last place gathers what is masked out.
        flat = torch.zeros(b, h, self.n_q * self.n_k + 1, dtype=torch.bool, device=self.device)
        for cell in self.cells:
            codes = cell.codes(self.n_q, self.n_k).expand(b, h, -1)
            flat.scatter_(2, codes, torch.ones_like(codes, dtype=torch.bool))
        return flat[..., :-1].reshape(b, h, self.n_q, self.n_k)

    def distinct(self) -> Selection:
        """Return the same pairs, each in its first cell only. Sorts the pairs; O(pairs) memory."""
        b, h = self.batch
        cells = [cell.spread(b, h) for cell in self.cells]
        codes = torch.cat([cell.codes(self.n_q, self.n_k) for cell in cells], dim=-1)
        line, order = codes.sort(dim=-1, stable=True)
        again = torch.zeros_like(line, dtype=torch.bool)
        again[..., 1:] = line[..., 1:] == line[..., :-1]
        fresh = torch.empty_like(again).scatter_(-1, order, ~again)
        sizes = [cell.allowed()[0, 0].numel() for cell in cells]
        parts = fresh.split(sizes, dim=-1)
        shapes = [(b, h, *cell.q_ids.shape[2:], cell.k_ids.shape[3]) for cell in cells]
        return self._with(
            [c.filtered(part.reshape(shape)) for c, part, shape in zip(cells, parts, shapes, strict=True)]
        )

    def tiled(self, tile: int) -> Selection:
        """Return the same pairs in cells of at most `tile` queries, without the keys that none of them needs.

        Worth it where a mask empties large parts of large cells. Reads counts from the device; not for
        selections with `Weights`, which belong to the cells as they were.
        """
        check_int(tile, "tile", 1)
        return self._with([part for cell in self.cells for part in cell.tiles(tile)])

    def holds(self, q: Int[Tensor, "#b #h ..."], k: Int[Tensor, "#b #h ..."]) -> Bool[Tensor, "..."]:
        """Say whether the selection has the pairs (q, k), ids that broadcast (B or 1, H or 1, ...)."""
        b, h = torch.broadcast_shapes(self.batch, q.shape[:2], k.shape[:2])
        sought = q * self.n_k + k
        sought = sought.expand(b, h, *sought.shape[2:])
        own = [cell.codes(self.n_q, self.n_k).expand(b, h, -1) for cell in self.cells]
        if not sum(codes.shape[2] for codes in own):
            return torch.zeros(sought.shape, dtype=torch.bool, device=sought.device)
        line = torch.cat(own, dim=-1).sort(dim=-1).values
        flat = sought.flatten(2).contiguous()
        at = torch.searchsorted(line, flat).clamp(max=line.shape[-1] - 1)
        # The number of masked-out pairs is no pair's, but absent ids could add up to it.
        real = flat < self.n_q * self.n_k
        return ((line.gather(-1, at) == flat) & real).view(sought.shape)

    def __and__(self, other: object) -> Selection:
        """Keep the pairs that `other` (Pattern, Selection, Schedule) has too; the cells stay."""
        if isinstance(other, Pattern):
            return self._filter(other)
        other = _selection(other)
        if other is None:
            return NotImplemented
        other.check(self.n_q, self.n_k)
        left, right = (self, other) if other.combine == "lse" else (other, self)
        if right.combine != "lse":
            raise bad("combine", (self.combine, other.combine), "'lse' for one of two selections joined by &")
        return left._with(
            [
                cell.filtered(
                    right.holds(cell.q_ids.clamp(min=0)[..., None], cell.k_ids.clamp(min=0)[..., None, :])
                )
                for cell in left.cells
            ]
        )

    __rand__ = __and__

    def __or__(self, other: object) -> Selection:
        """Add the pairs of `other` (Pattern, Selection, Schedule); none is counted twice."""
        self._needs_lse("|")
        if isinstance(other, Pattern):
            # The pattern keeps its (regular, shared) cells; only the selection's own pairs are thinned out.
            added = Selection.of_pattern(other, self.n_q, self.n_k).to(self.device)
            return self._with([*added.cells, *self._filter(~other).cells])
        other = _selection(other)
        if other is None:
            return NotImplemented
        other._needs_lse("|")
        other.check(self.n_q, self.n_k)
        return self._with([*self.cells, *other.cells]).distinct()

    __ror__ = __or__

    def __invert__(self) -> Selection:
        """All pairs the selection does not have: one cell with an N_q x N_k mask."""
        self._needs_lse("~")
        every_q = torch.arange(self.n_q, device=self.device).expand(1, 1, 1, -1)
        every_k = torch.arange(self.n_k, device=self.device).expand(1, 1, 1, -1)
        return self._with([cells_of(every_q, every_k, ~self.dense()[:, :, None])])

    def _filter(self, pattern: Pattern) -> Selection:
        pattern.check(self.n_q, self.n_k)
        refuse_phantoms(pattern, "combined with a Selection")
        kept = []
        for cell in self.cells:
            q, k = cell.q_ids.clamp(min=0)[..., :, None], cell.k_ids.clamp(min=0)[..., None, :]
            kept.append(cell.filtered(pattern.allowed(q, k, self.n_q, self.n_k)))
        return self._with(kept)

    def _with(self, cells: Sequence[Cells]) -> Selection:
        return Selection.of_cells(cells, self.n_q, self.n_k, self.combine)

    def _needs_lse(self, symbol: str) -> None:
        if self.combine != "lse":
            raise bad("combine", self.combine, f"'lse' for a selection under {symbol}")

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{tuple(c.q_ids.shape[:3])} cells of {c.q_ids.shape[3]}x{c.k_ids.shape[3]}" for c in self.cells
        )
        return f"<{type(self).__name__} n_q={self.n_q} n_k={self.n_k} combine={self.combine!r}: {shapes}>"


def _selection(other: object) -> Selection | None:
    """See a Schedule as a Selection; None for what is neither."""
    if isinstance(other, Schedule):
        return Selection.of_schedule(other)
    return other if isinstance(other, Selection) else None


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
