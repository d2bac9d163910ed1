"""Strided views of boxes against index arithmetic: runs, disjoint phases, gathering and adding back."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.kernels.boxes import Box, Run, pair_runs, read_box


def cells_of(run):
    """Return the positions of each cell, outer-major."""
    return [
        [run.base + a * run.outer_step + b * run.inner_step + run.step * t for t in range(run.count)]
        for a in range(run.outer)
        for b in range(run.inner)
    ]


@st.composite
def runs(draw):
    step = draw(st.integers(1, 3))
    outer, inner, count = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    inner_step = step * draw(st.integers(0, 4))
    return Run(draw(st.integers(0, 2)), outer, draw(st.integers(0, 9)), inner, inner_step, step, count)


def ids_of(box, n):
    """Return the token ids of every cell in the order (c0, c1, t), by index arithmetic."""
    pitches = [1]
    for size in reversed(box.sizes[1:]):
        pitches.insert(0, pitches[0] * size)
    axes = []
    for run, pitch in zip(box.runs, pitches, strict=True):
        axes.append([[i * pitch for i in cell] for cell in cells_of(run)])
    first = box.runs[0]
    out = []
    for inner in range(first.inner):
        zero = [axes[0][a * first.inner + inner] for a in range(first.outer)]
        row = []
        for cell in itertools.product(zero, *axes[1:]):
            grid = [box.offset + sum(parts) for parts in itertools.product(*cell)]
            row.append([*range(box.lead), *grid])
        out.append(row)
    return torch.tensor(out)


@st.composite
def boxes(draw):
    made = tuple(draw(st.lists(runs(), min_size=1, max_size=3)))
    sizes = tuple(max(max(c) for c in cells_of(r)) + 1 + draw(st.integers(0, 2)) for r in made)
    return Box(sizes, made, draw(st.integers(0, 2)), 0)


@given(boxes(), st.integers(0, 2), st.data())
def test_take_and_add(box, lead, data):
    box = Box(box.sizes, box.runs, max(box.offset, lead), lead)
    n = box.offset + torch.tensor(box.sizes).prod().item()
    x = torch.randn(2, 2, n, 3, dtype=torch.float64)
    ids = ids_of(box, n)
    want = x[:, :, ids].permute(2, 0, 1, 3, 4, 5)
    got = box.take(x)
    assert torch.equal(got, want)
    assert (box.c0, box.c1, box.tokens) == ids.shape
    g = torch.randn(got.shape, dtype=torch.float64)
    total = torch.zeros_like(x)
    box.add_to(total, g)
    rows = g.permute(1, 2, 0, 3, 4, 5).flatten(2, 4)
    torch.testing.assert_close(total, torch.zeros_like(x).index_add_(2, ids.flatten(), rows))
    first = data.draw(st.integers(0, box.c0 - 1))
    last = data.draw(st.integers(first + 1, box.c0))
    assert torch.equal(box.narrow(first, last).take(x), want[first:last])
    assert read_box((7, *box.ints()), 1) == (box, 1 + len(box.ints()))


@given(runs())
def test_phases_hold_every_cell_once_and_never_overlap(run):
    """What is written at the same time must not overlap: the additions run in several threads."""
    every = cells_of(run)
    found = []
    for part, outer, inner in run.phases():
        cells = cells_of(part)
        tokens = [t for cell in cells for t in cell]
        assert len(tokens) == len(set(tokens))
        index = torch.arange(run.cells).view(run.outer, run.inner)[outer, inner].flatten().tolist()
        assert [every[i] for i in index] == cells
        found += index
    assert sorted(found) == list(range(run.cells))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12, unique=True),
    st.integers(1, 3),
    st.integers(1, 4),
    st.data(),
)
def test_pair_runs_arrange_every_cell_once(q_starts, q_step, q_count, data):
    k_starts = sorted(data.draw(st.lists(st.integers(0, 9), min_size=len(q_starts), max_size=len(q_starts))))
    pairs = pair_runs(q_starts, q_step, q_count, k_starts, 2, 3)
    got = []
    for q, k in pairs:
        assert (q.outer, q.inner) == (k.outer, k.inner)
        got += [(a[0], b[0]) for a, b in zip(cells_of(q), cells_of(k), strict=True)]
    assert sorted(got) == sorted(zip(q_starts, k_starts, strict=True))


def test_regular_tiles_are_one_run():
    starts = list(range(0, 64, 8))
    assert len(pair_runs(starts, 1, 8, starts, 1, 20)) == 1
    dilated = [r + 16 * i for r in range(2) for i in range(4)]
    assert len(pair_runs(dilated, 2, 8, dilated, 2, 14)) == 1
