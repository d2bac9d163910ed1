"""Reading and writing box-shaped cells of a grid through strided views: no key list, little copying.

The cells of a translation class start, along each axis, at arithmetic progressions. Tensor.unfold turns such
a progression into a view, so gathering all cells of a class is one strided copy (20x faster on a CPU than
looking rows up by index), and along the slowest axis overlapping cells need no copy at all: they are windows
of one strip.

Layout of gathered cells: `(c0, b, h, c1, t, d)`, c0 the cells along the slowest axis, c1 all the others, t
the tokens of a cell. Backends merge `b, h, c1` for free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Cells along one axis: `base + a * outer_step + b * inner_step + step * t`, a < outer, b < inner, t <
    count.

    Two nested progressions, because the cells of a dilated pattern repeat in every residue class.
    """

    base: int
    outer: int
    outer_step: int
    inner: int
    inner_step: int
    step: int
    count: int

    @property
    def span(self) -> int:
        """Positions from the first to the last token of a cell."""
        return (self.count - 1) * self.step + 1

    @property
    def reach(self) -> int:
        """Positions from the first to the last token of an inner progression."""
        return (self.inner - 1) * self.inner_step + self.span

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.outer * self.inner

    def inner_slice(self, first: int, last: int) -> Run:
        """Keep the inner cells `first <= b < last`."""
        return replace(self, base=self.base + first * self.inner_step, inner=last - first)

    def phases(self) -> Iterator[tuple[Run, slice, slice]]:
        """Split into runs whose cells do not overlap, with the (outer, inner) cells each of them holds."""
        m_in = _phases(self.inner, self.inner_step, self.span)
        if (
            self.step > 1
            and self.outer_step % self.step
            and _distinct(self.outer, self.outer_step, self.step)
        ):
            m_out = 1  # different residue classes share no token
        else:
            m_out = _phases(self.outer, self.outer_step, self.reach)
        for a, b in product(range(m_out), range(m_in)):
            outer, inner = slice(a, None, m_out), slice(b, None, m_in)
            yield (
                Run(
                    self.base + a * self.outer_step + b * self.inner_step,
                    len(range(a, self.outer, m_out)), m_out * self.outer_step,
                    len(range(b, self.inner, m_in)), m_in * self.inner_step,
                    self.step, self.count,
                ),
                outer, inner,
            )  # fmt: skip

    def ints(self) -> tuple[int, ...]:
        """Flatten, the inverse of `Run(*ints)`."""
        return (self.base, self.outer, self.outer_step, self.inner, self.inner_step, self.step, self.count)


def _phases(n: int, step: int, span: int) -> int:
    return 1 if n == 1 else n if step == 0 else min(n, -(-span // step))


def _distinct(n: int, step: int, modulo: int) -> bool:
    return len({i * step % modulo for i in range(n)}) == n


@dataclass(frozen=True)
class Box:
    """Cells that are products of runs over the axes of a row-major grid.

    Attributes:
        sizes: the grid.
        runs: one per axis.
        offset: tokens that stand before the grid.
        lead: how many of the first tokens are in every cell too, before its own.
    """

    sizes: tuple[int, ...]
    runs: tuple[Run, ...]
    offset: int = 0
    lead: int = 0

    @property
    def c0(self) -> int:
        """Cells along c0."""
        return self.runs[0].inner

    @property
    def c1(self) -> int:
        """Cells along c1."""
        return self.runs[0].outer * math.prod(run.cells for run in self.runs[1:])

    @property
    def tokens(self) -> int:
        """Tokens of a cell."""
        return self.lead + math.prod(run.count for run in self.runs)

    def narrow(self, first: int, last: int) -> Box:
        """Keep the cells `first <= c0 < last`."""
        return replace(self, runs=(self.runs[0].inner_slice(first, last), *self.runs[1:]))

    def stored_rows(self) -> int:
        """Rows per (b, h) that `take` copies."""
        if self._as_strips():
            run = self.runs[0]
            rows = (run.inner - 1) * (run.inner_step // run.step) + run.count
            return rows * self.c1 * math.prod(r.count for r in self.runs[1:])
        return self.c0 * self.c1 * self.tokens

    def _as_strips(self) -> bool:
        """Whether c0 can be a view: nothing in front, and strips no longer than what they save."""
        run = self.runs[0]
        if self.lead or run.inner == 1 or run.inner_step % run.step or run.inner_step == 0:
            return False
        return run.inner_step // run.step <= run.count

    def take(self, x: Shaped[Tensor, "b h n d"]) -> Shaped[Tensor, "c0 b h c1 t d"]:
        """Gather the cells; a view where possible, so never write to the result."""
        b, h, _, d = x.shape
        grid = self._grid(x)
        if self._as_strips():
            first = self.runs[0]
            whole = Run(
                first.base, first.outer, first.outer_step, 1, 0, first.step,
                (first.inner - 1) * (first.inner_step // first.step) + first.count,
            )  # fmt: skip
            row = math.prod(run.count for run in self.runs[1:])
            strips = _windows(grid, (whole, *self.runs[1:]))
            strips = strips.reshape(b * h * self.c1, whole.count * row, d)
            cells = strips.unfold(1, first.count * row, first.inner_step // first.step * row)
            return cells.permute(1, 0, 3, 2).unflatten(1, (b, h, self.c1))
        cells = _windows(grid, self.runs)
        cells = cells.reshape(self.c0, b, h, self.c1, self.tokens - self.lead, d)
        if self.lead:
            lead = x[:, :, : self.lead][None, :, :, None].expand(self.c0, b, h, self.c1, self.lead, d)
            cells = torch.cat([lead, cells], -2)
        return cells

    def add_to(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 t d"]) -> None:
        """Add gathered cells back onto their tokens, in place: the transpose of `take`. Deterministic."""
        b, h, _, d = x.shape
        grid = self._grid(x)
        if self.lead:
            x[:, :, : self.lead] += cells[..., : self.lead, :].sum((0, 3))
            cells = cells[..., self.lead :, :]
        shape = [self.c0, b, h, self.runs[0].outer]
        for run in self.runs[1:]:
            shape += [run.outer, run.inner]
        # (c0, b, h, outer0, outer1, inner1, .., t0, t1, .., d), the layout of _windows
        cells = cells.reshape(*shape, *(run.count for run in self.runs), d)
        for parts in product(*(tuple(run.phases()) for run in self.runs)):
            index: list[slice] = [parts[0][2], slice(None), slice(None), parts[0][1]]
            for _, outer, inner in parts[1:]:
                index += [outer, inner]
            _windows(grid, tuple(run for run, _, _ in parts)).add_(cells[tuple(index)])

    def put(self, x: Shaped[Tensor, "b h n d"], cells: Shaped[Tensor, "c0 b h c1 t d"]) -> None:
        """Write cells that overlap nowhere to their tokens."""
        view = _windows(self._grid(x), self.runs)
        view.copy_(cells.reshape(view.shape))

    def _grid(self, x: Tensor) -> Tensor:
        return x.narrow(2, self.offset, math.prod(self.sizes)).unflatten(2, self.sizes)

    def ints(self) -> tuple[int, ...]:
        """Flatten to integers, the inverse of `read_box`."""
        flat = [self.offset, self.lead, len(self.sizes), *self.sizes]
        for run in self.runs:
            flat += run.ints()
        return tuple(flat)


def read_box(code: Sequence[int], at: int) -> tuple[Box, int]:
    """Read a Box from flat integers; return it and the position after it."""
    offset, lead, ndim = code[at : at + 3]
    at += 3
    sizes = tuple(code[at : at + ndim])
    at += ndim
    runs = tuple(Run(*code[at + 7 * i : at + 7 * i + 7]) for i in range(ndim))
    return Box(sizes, runs, offset, lead), at + 7 * ndim


def _windows(grid: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """View `(b, h, g0, g1, .., d)` as `(inner0, b, h, outer0, outer1, inner1, .., t0, t1, .., d)`."""
    n = len(runs)
    x = grid
    # Each axis turns into (outer at its place, inner and t at the end).
    for axis, run in enumerate(runs):
        x = _progression(x, 2 + axis, run.base, run.reach, run.outer, run.outer_step)
        x = _progression(x, x.ndim - 1, 0, run.span, run.inner, run.inner_step)
        x = x[..., :: run.step]
    d = 2 + n
    outer, inner, tokens = (
        [2 + i for i in range(n)],
        [d + 1 + 2 * i for i in range(n)],
        [d + 2 + 2 * i for i in range(n)],
    )
    order = [inner[0], 0, 1, outer[0]]
    for i in range(1, n):
        order += [outer[i], inner[i]]
    return x.permute(*order, *tokens, d)


def _progression(x: Tensor, dim: int, base: int, size: int, n: int, step: int) -> Tensor:
    """View dimension `dim` as `n` windows of `size` that start at `base + i * step`; windows go last."""
    if step == 0 or n == 1:
        x = x.narrow(dim, base, size).unfold(dim, size, 1)
        return x if n == 1 else x.expand(*(n if i == dim else -1 for i in range(x.ndim)))
    return x.narrow(dim, base, (n - 1) * step + size).unfold(dim, size, step)


def pair_runs(
    q_starts: Sequence[int], q_step: int, q_count: int, k_starts: Sequence[int], k_step: int, k_count: int
) -> list[tuple[Run, Run]]:
    """Arrange the cells of one axis, given by their first query and first key, into few pairs of runs."""
    by_residue: dict[int, list[tuple[int, int]]] = {}
    for pair in sorted(zip(q_starts, k_starts, strict=True)):
        by_residue.setdefault(pair[0] % q_step, []).append(pair)
    inner = [run for cells in by_residue.values() for run in _progressions(cells)]
    out = []
    shapes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for (q, k), n, (dq, dk) in inner:
        shapes.setdefault((n, dq, dk), []).append((q, k))
    for (n, dq, dk), bases in shapes.items():
        for (q, k), m, (oq, ok) in _progressions(sorted(bases)):
            # Single cells in a row are one inner progression.
            q_cells, k_cells = ((1, 0, m, oq), (1, 0, m, ok)) if n == 1 else ((m, oq, n, dq), (m, ok, n, dk))
            out.append((Run(q, *q_cells, q_step, q_count), Run(k, *k_cells, k_step, k_count)))
    return out


def _progressions(pairs: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int, tuple[int, int]]]:
    """Cut sorted pairs into arithmetic progressions: (first pair, length, difference); keys never go down."""
    out, at = [], 0
    while at < len(pairs):
        first, n, diff = pairs[at], 1, (0, 0)
        if at + 1 < len(pairs):
            candidate = (pairs[at + 1][0] - first[0], pairs[at + 1][1] - first[1])
            if candidate[1] >= 0:
                diff, n = candidate, 2
                while (
                    at + n < len(pairs)
                    and (
                        pairs[at + n][0] - pairs[at + n - 1][0],
                        pairs[at + n][1] - pairs[at + n - 1][1],
                    )
                    == diff
                ):
                    n += 1
        out.append((first, n, diff))
        at += n
    return out
