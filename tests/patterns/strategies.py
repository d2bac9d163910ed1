"""Hypothesis strategies for patterns: odd sizes, unequal dilation groups, partial groups, every border."""

import torch
from hypothesis import strategies as st

from foveate.core.grid import Grid
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows


@st.composite
def grids(draw, max_ndim=3, max_tokens=90):
    """Grids with odd and tiny axes."""
    sizes = draw(st.lists(st.integers(1, 11), min_size=1, max_size=max_ndim))
    while torch.tensor(sizes).prod() > max_tokens:
        sizes[sizes.index(max(sizes))] = max(1, max(sizes) // 2)
    return Grid(*sizes)


@st.composite
def neighborhoods(draw, grid=None):
    grid = draw(grids()) if grid is None else grid
    window, dilation, stride, causal = [], [], [], []
    for length in grid:
        window.append(draw(st.integers(1, length)))
        dilation.append(draw(st.integers(1, length // window[-1])))
        stride.append(draw(st.integers(1, window[-1])))
        causal.append(draw(st.booleans()))
    return Neighborhood(grid, tuple(window), tuple(dilation), tuple(stride), tuple(causal))


@st.composite
def windows(draw, grid=None):
    grid = draw(grids()) if grid is None else grid
    size = tuple(draw(st.integers(1, length)) for length in grid)
    return Windows(grid, size, tuple(draw(st.integers(0, m - 1)) for m in size))


@st.composite
def halos(draw, grid=None, borders=("mask", "clamp", "zero")):
    grid = draw(grids()) if grid is None else grid
    border = draw(st.sampled_from(borders))
    block = tuple(draw(st.integers(1, length)) for length in grid)
    room = [(length - b) // 2 if border == "clamp" else 3 for length, b in zip(grid, block, strict=True)]
    return Halo(grid, block, tuple(draw(st.integers(0, r)) for r in room), border)


@st.composite
def lattices(draw, grid=None):
    grid = draw(grids()) if grid is None else grid
    return Lattice(
        grid, tuple(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in grid)
    )


def grid_patterns(grid=None, borders=("mask", "clamp")):
    return st.one_of(neighborhoods(grid), windows(grid), halos(grid, borders), lattices(grid))


def sequence_patterns():
    """Patterns for any two lengths, with a closed form."""
    return st.one_of(
        st.just(Full()),
        st.builds(Causal, st.sampled_from(["end", "start"])),
        st.builds(SlidingWindow, st.integers(0, 6), st.integers(0, 6)),
        st.builds(Sinks, st.integers(0, 4)),
    )


@st.composite
def tables(draw, n_q, n_k):
    """Explicit masks and block lists of the given lengths."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        return Explicit(torch.rand(n_q, n_k, generator=generator) < 0.4)
    block = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    blocks = -(-n_q // block[0]), -(-n_k // block[1])
    return BlockList(block, torch.rand(*blocks, generator=generator) < 0.4)


@st.composite
def patterns(draw, n_q, n_k, depth=2):
    """Composed patterns of the given lengths, grids included when the lengths agree."""
    if depth and draw(st.booleans()):
        left, right = draw(patterns(n_q, n_k, depth - 1)), draw(patterns(n_q, n_k, depth - 1))
        return draw(st.sampled_from([left & right, left | right, ~left]))
    kinds = [sequence_patterns(), tables(n_q, n_k)]
    if n_q == n_k and n_q:
        kinds.append(grid_patterns(draw(st.sampled_from(factorings(n_q)))))
    return draw(st.one_of(*kinds))


def factorings(n):
    """All 1-d and 2-d grids of n tokens."""
    return [Grid(n)] + [Grid(a, n // a) for a in range(2, n) if n % a == 0]


def copy_of(pattern):
    """Evaluate the repr, as a user who pastes it would."""
    import foveate.core.grid
    import foveate.patterns

    return eval(repr(pattern), {**vars(foveate.core.grid), **vars(foveate.patterns)})
