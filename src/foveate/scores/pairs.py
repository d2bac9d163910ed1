"""`Pairs`: which (query, key) pairs a block of logits holds, and how tensors are looked up at them.

Scores, rules and after-values are written once and run on the whole N_q x N_k problem as well as on the cells
of a Schedule, because both hand them a block of logits `(B, H, *cells, t_q, t_k)` together with a `Pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid


@dataclass(frozen=True)
class KeyFrame:
    """Keys padded with phantoms: `padded` is the grid of all keys, `base` that of the real ones.

    The key at coordinate `c` of `padded` stands at coordinate `c - low` of `base` (outside `base`: a
    phantom).
    """

    base: Grid
    padded: Grid
    low: tuple[int, ...]

    def pad(self, x: Shaped[Tensor, "..."], *, dim: int, value: float | bool = 0) -> Shaped[Tensor, "..."]:
        """Spread dimension `dim` of `x`, one entry a real key, over all keys; phantoms get `value`."""
        dim = dim % x.ndim
        moved = x.movedim(dim, -1).unflatten(-1, self.base.sizes)
        edges: list[int] = []
        for real, full, low in zip(
            reversed(self.base.sizes), reversed(self.padded.sizes), reversed(self.low), strict=True
        ):
            edges += [low, full - real - low]
        return F.pad(moved, edges, value=value).flatten(-self.base.ndim).movedim(-1, dim)


class Pairs:
    """The query and key ids of a block of logits `(B, H, *cells, t_q, t_k)`.

    Attributes:
        q: long `(b, h, *cells, t_q)`, b and h being 1 or the full size. Absent ids (-1) read as 0 here.
        k: long `(b, h, *cells, t_k)`.
        n_q, n_k: how many queries and keys there are in all (phantom keys included).
        frame: set when keys were padded with phantoms.
        dense: the block is the whole problem: `q` and `k` count upwards and there are no cells.
        alike: every cell sees the same key - query offsets, so that one of them stands for all.
    """

    __slots__ = ("_k_raw", "_q_raw", "alike", "dense", "frame", "k", "n_k", "n_q", "q")

    def __init__(
        self,
        q_ids: Int[Tensor, "b h *cells tq"],
        k_ids: Int[Tensor, "b h *cells tk"],
        *,
        n_q: int,
        n_k: int,
        frame: KeyFrame | None = None,
        dense: bool = False,
        alike: bool = False,
    ):
        self._q_raw, self._k_raw = q_ids, k_ids
        self.q = q_ids if dense else q_ids.clamp_min(0)
        self.k = k_ids if dense else k_ids.clamp_min(0)
        self.n_q, self.n_k, self.frame, self.dense, self.alike = n_q, n_k, frame, dense, alike

    @classmethod
    def full(cls, n_q: int, n_k: int, *, device=None, frame: KeyFrame | None = None) -> Pairs:
        """Return the pairs of the whole problem."""
        q = torch.arange(n_q, device=device)[None, None]
        k = torch.arange(n_k, device=device)[None, None]
        return cls(q, k, n_q=n_q, n_k=n_k, frame=frame, dense=True)

    @property
    def present(self) -> Shaped[Tensor, "b h *cells tq tk"]:
        """Bool: neither the query nor the key of the pair is absent (-1)."""
        return (self._q_raw >= 0)[..., :, None] & (self._k_raw >= 0)[..., None, :]

    def query_coords(self, grid: Grid | None, lead: int = 0) -> tuple[Int[Tensor, "b h *cells tq 1"], ...]:
        """Return one coordinate tensor per axis; `grid=None` numbers tokens on one endless axis.

        `lead` tokens stand before the grid; theirs come out as those of negative ids, mask them.
        """
        ids = self.q[..., :, None] - lead
        return (ids,) if grid is None else grid.unravel(ids)

    def key_coords(self, grid: Grid | None, lead: int = 0) -> tuple[Int[Tensor, "b h *cells 1 tk"], ...]:
        """Return one coordinate tensor per axis; phantom keys have theirs outside the grid.

        Raises:
            UnsupportedError: if keys were padded on another grid than `grid`.
        """
        ids = self.k[..., None, :] - lead
        if self.frame is None:
            return (ids,) if grid is None else grid.unravel(ids)
        base = self.frame.base
        if lead or (grid is None and base.ndim > 1) or (grid is not None and grid != base):
            raise UnsupportedError(
                f"score: the pattern has phantom keys on {base}, but the score counts keys on {grid} "
                f"after {lead} leading tokens. Give both the same grid."
            )
        coords = self.frame.padded.unravel(ids)
        return tuple(c - low for c, low in zip(coords, self.frame.low, strict=True))

    def offsets(
        self, grid: Grid | None, query_grid: Grid | None = None, lead: int = 0
    ) -> tuple[Int[Tensor, "b h *cells tq tk"], ...]:
        """Return key coordinate minus query coordinate, per axis.

        When the cells are `alike`, only the first is computed and every cell dimension has size 1.
        """
        if self.alike and not self.dense:
            first = (slice(None), slice(None), *(slice(0, 1) for _ in self.q.shape[2:-1]))
            one = Pairs(self.q[first], self.k[first], n_q=self.n_q, n_k=self.n_k, frame=self.frame)
            return one.offsets(grid, query_grid, lead)
        q = self.query_coords(query_grid or grid, lead)
        return tuple(kc - qc for kc, qc in zip(self.key_coords(grid, lead), q, strict=True))


def take_rows(
    x: Shaped[Tensor, "b h n *rest"], ids: Int[Tensor, "bi hi *cells t"]
) -> Shaped[Tensor, "bo ho *cells t *rest"]:
    """Look rows of `x` up at non-negative `ids`; sizes 1 of `b`, `h` and `n` broadcast.

    A size-1 `n` is not looked up: it comes back as size-1 cells and t, ready to broadcast.
    """
    cells, rest = ids.ndim - 3, x.shape[3:]
    if x.shape[2] == 1:
        return x.reshape(*x.shape[:2], *([1] * cells), 1, *rest)
    if ids.shape[0] == 1 and ids.shape[1] == 1:
        rows = x.index_select(2, ids.reshape(-1))
        return rows.reshape(*x.shape[:2], *ids.shape[2:], *rest)
    b, h = max(x.shape[0], ids.shape[0]), max(x.shape[1], ids.shape[1])
    if 0 in (x.shape[0], ids.shape[0]):
        b = 0
    flat = ids.flatten(2).expand(b, h, -1)  # `flatten` and not -1: a batch may be empty
    index = flat.reshape(*flat.shape, *([1] * len(rest))).expand(*flat.shape, *rest)
    rows = x.expand(b, h, *x.shape[2:]).gather(2, index)
    return rows.reshape(b, h, *ids.shape[2:], *rest)


def look_up(
    x: Shaped[Tensor, "b h n *rest"], ids: Int[Tensor, "bi hi *cells t"]
) -> Shaped[Tensor, "bo ho *cells t *rest"]:
    """Look rows of `x` up at non-negative `ids`, a single row too: products do not broadcast as sums do."""
    rows = take_rows(x, ids)
    return rows.expand(*rows.shape[:2], *ids.shape[2:], *x.shape[3:])


def take_pairs(
    x: Shaped[Tensor, "b h nq nk"], at: Pairs, *, phantom: float | bool = 0
) -> Shaped[Tensor, "..."]:
    """Look an N_q x N_k map up at the pairs; phantom keys read `phantom`.

    The result broadcasts to `(b, h, *cells, tq, tk)`: what was size 1 in the map stays size 1.
    """
    if at.frame is not None and x.shape[-1] > 1:
        x = at.frame.pad(x, dim=-1, value=phantom)
    if at.dense:
        return x
    cells = at.q.ndim - 3
    if x.shape[2] == 1:
        return take_rows(x[:, :, 0], at.k).unsqueeze(-2)
    if x.shape[3] == 1:
        return take_rows(x[..., 0], at.q).unsqueeze(-1)

    def along(size: int, dim: int) -> Tensor:
        index = torch.arange(size, device=x.device)
        return index.reshape([-1 if i == dim else 1 for i in range(cells + 4)])

    return x[along(x.shape[0], 0), along(x.shape[1], 1), at.q[..., :, None], at.k[..., None, :]]
