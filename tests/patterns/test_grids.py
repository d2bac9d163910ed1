"""Grid patterns: products of axes, and what the papers say about them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from tests.patterns.strategies import copy_of, grid_patterns, grids, halos, neighborhoods, windows


def product(axes):
    """Expand per-axis rules to the mask over the row-major grid."""
    out = torch.ones(1, 1, dtype=torch.uint8)
    for rule in axes:
        out = torch.kron(out, rule.dense().to(torch.uint8))
    return out.bool()


@given(grid_patterns(borders=("mask", "clamp", "zero")))
def test_axes_are_the_mask(pattern):
    assert torch.equal(product(pattern.axes()), pattern.dense())


@given(neighborhoods())
def test_neighborhood_counts(pattern):
    rows = pattern.dense().sum(1)
    if not any(pattern.causal):
        assert (rows == torch.tensor(pattern.window).prod()).all()
    else:
        assert (rows >= 1).all()


@given(neighborhoods(Grid(7, 6)))
def test_neighborhood_by_hand_in_two_dimensions(pattern):
    from tests.patterns.test_axis import neighborhood_keys

    dense = pattern.dense()
    per_axis = list(
        zip(pattern.grid, pattern.window, pattern.dilation, pattern.stride, pattern.causal, strict=True)
    )
    for n in range(42):
        ys, xs = (neighborhood_keys(i, *a) for i, a in zip((n // 6, n % 6), per_axis, strict=True))
        assert set(dense[n].nonzero().flatten().tolist()) == {y * 6 + x for y in ys for x in xs}


@given(grids())
def test_window_of_the_whole_axis_is_full(grid):
    assert Neighborhood(grid, grid.sizes).dense().all()
    for stride in {1, min(grid)}:
        assert Neighborhood(grid, grid.sizes, stride=stride).dense().all()
    assert Windows(grid, grid.sizes).dense().all()
    assert Halo(grid, grid.sizes, 0).dense().all()
    assert Lattice(grid, grid.sizes).dense().all()


@given(st.integers(1, 5), st.integers(1, 5))
def test_stride_of_the_window_is_blocks(m, n):
    assert torch.equal(Neighborhood(m * n, m, stride=m).dense(), Windows(m * n, m).dense())


def test_a_partial_last_stride_group_gets_a_whole_window():
    assert Neighborhood(7, 3, stride=3).dense()[6].tolist() == [False] * 4 + [True] * 3
    assert Windows(7, 3).dense()[6].tolist() == [False] * 6 + [True]


def test_even_windows_look_left():
    assert Neighborhood(8, 4).dense()[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


@given(neighborhoods())
def test_dilation_is_undilated_on_each_subgrid(pattern):
    grid, dense = pattern.grid, pattern.dense()
    coords = grid.coords()
    residue = coords % torch.tensor(pattern.dilation)
    for r in residue.unique(dim=0):
        inside = (residue == r).all(1)
        part = [len(range(int(a), n, d)) for a, n, d in zip(r, grid, pattern.dilation, strict=True)]
        plain = Neighborhood(tuple(part), pattern.window, 1, pattern.stride, pattern.causal)
        assert torch.equal(dense[inside][:, inside], plain.dense())
        assert not dense[inside][:, ~inside].any()


@given(windows())
def test_windows_are_swins_shifted_windows(pattern):
    """Roll, cut into windows, and keep pairs with the same region label: the published recipe."""
    grid = pattern.grid
    label = torch.zeros(grid.numel, dtype=torch.long)
    coords = grid.coords()
    for axis, (length, m, s) in enumerate(zip(grid, pattern.size, pattern.shift, strict=True)):
        if length % m:
            return  # Swin needs sizes that divide.
        rolled = (coords[:, axis] - s) % length
        region = (rolled >= length - m).long() + (rolled >= length - s).long() if s else rolled * 0
        label = (label * length + rolled // m) * 3 + region
    assert torch.equal(pattern.dense(), label[:, None] == label[None])


@given(halos(borders=("mask",)))
def test_halo_by_hand(pattern):
    coords = pattern.grid.coords()
    block, halo = torch.tensor(pattern.block), torch.tensor(pattern.halo)
    low = coords // block * block - halo
    high = coords // block * block + block + halo
    want = ((low[:, None] <= coords[None]) & (coords[None] < high[:, None])).all(-1)
    assert torch.equal(pattern.dense(), want)
    zero = Halo(pattern.grid, pattern.block, pattern.halo, "zero")
    assert torch.equal(zero.dense(), want)
    assert zero.phantoms() == pattern.grid.numel * int((block + 2 * halo).prod()) - int(want.sum())
    assert pattern.phantoms() == 0
    assert pattern.padded() is None


@given(halos(borders=("zero",)))
def test_padded_halo(pattern):
    """Over the padded grid every query has its whole window, and its real part is the mask."""
    padded = pattern.padded()
    grid = pattern.grid
    assert padded.key_grid.sizes == tuple(
        a + n + b for a, n, b in zip(padded.lo, grid, padded.hi, strict=True)
    )
    assert padded.offset == tuple(-a for a in padded.lo)
    dense = padded.pattern.dense()
    assert dense.shape == (grid.numel, padded.key_grid.numel)
    assert torch.equal(product(padded.pattern.axes()), dense)
    assert copy_of(padded.pattern) == padded.pattern
    coords = padded.key_grid.coords() + torch.tensor(padded.offset)
    real = ((coords >= 0) & (coords < torch.tensor(grid.sizes))).all(1)
    assert torch.equal(dense[:, real], pattern.dense())
    assert int(dense[:, ~real].sum()) == pattern.phantoms()
    assert (dense.sum(1) == int((torch.tensor(pattern.block) + 2 * torch.tensor(pattern.halo)).prod())).all()


def test_halo_clamp_keeps_the_window_whole():
    dense = Halo(8, 2, 1, "clamp").dense()
    assert (dense.sum(1) == 4).all()
    assert dense[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert dense[7].nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_lattice_is_windows_on_the_permuted_map():
    grid, size = Grid(6, 8), (3, 2)
    coords = grid.coords()
    step = torch.tensor([6 // 3, 8 // 2])
    moved = coords % step * torch.tensor(size) + coords // step
    order = grid.ravel(moved.unbind(1))
    windows_ = Windows(grid, size).dense()
    assert torch.equal(Lattice(grid, size).dense(), windows_[order][:, order])


def test_windows_and_lattice_join_every_pair_in_two_hops():
    grid = Grid(8, 8)
    hops = Lattice(grid, 4).dense().float() @ Windows(grid, 4).dense().float()
    assert (hops > 0).all()


def test_tuples_lists_and_grids_are_the_same():
    one = Neighborhood(Grid(6, 6), 3)
    assert one == Neighborhood((6, 6), (3, 3)) == Neighborhood([6, 6], [3, 3], [1, 1], 1, [False, False])
    assert hash(one) == hash(Neighborhood((6, 6), (3, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighborhood((8, 8), 9), "window: .*at most 8"),
        (lambda: Neighborhood((8, 4), 5), "window: .*at most 4"),
        (lambda: Neighborhood(8, 0), "window: .*>= 1"),
        (lambda: Neighborhood(8, -3), "window"),
        (lambda: Neighborhood(8, 3.0), "window"),
        (lambda: Neighborhood(8, True), "window"),
        (lambda: Neighborhood((8, 8), (3,)), "window"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), "window"),
        (lambda: Neighborhood((8, 8), (3, True)), "window"),
        (lambda: Neighborhood((8, 8), "33"), "window"),
        (lambda: Neighborhood(8, None), "window"),
        (lambda: Neighborhood(8, 3, 3), "dilation: .*largest dilation is 2"),
        (lambda: Neighborhood(8, 3, 0), "dilation"),
        (lambda: Neighborhood(8, 3, stride=4), "stride: .*at most the window"),
        (lambda: Neighborhood(8, 3, stride=0), "stride"),
        (lambda: Neighborhood(8, 3, causal=1), "causal"),
        (lambda: Neighborhood((8, 8), 3, causal=(True,)), "causal"),
        (lambda: Neighborhood((8, 0), 3), "Grid"),
        (lambda: Windows(8, 9), "size"),
        (lambda: Windows(8, 4, 4), "shift: .*shift % 4"),
        (lambda: Windows(8, 4, -1), "shift"),
        (lambda: Halo(8, 9, 1), "block"),
        (lambda: Halo(8, 4, -1), "halo"),
        (lambda: Halo(8, 4, 3, "clamp"), "halo: .*border='mask'"),
        (lambda: Halo(8, 4, 1, "wrap"), "border"),
        (lambda: Lattice(8, 3), "size: .*nearest is"),
        (lambda: Halo(8, 2, 1, "zero").phantoms(9), "n_q"),
        (lambda: Halo(8, 2, 1, "zero").padded().pattern.dense(8, 8), "n_k"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
