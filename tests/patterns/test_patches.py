"""Patches: against torch's unfold, reflection padding and the windows that border="clamp" moves inside."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.patterns.grids import Halo
from foveate.patterns.patches import Patches


def unfolded(x, **options):
    """torch's boxes, (boxes, size * size)."""
    return functional.unfold(x[None, None], **options)[0].T


def numbered(grid):
    return torch.arange(1.0, grid.numel + 1).reshape(grid.sizes)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
)
def test_masked_boxes_are_those_of_a_zero_padded_unfold(sizes, size, stride, dilation, padding):
    span = dilation * (size - 1) + 1
    counts = [(n + 2 * padding - span) // stride + 1 for n in sizes]
    if min(counts) < 1 or padding >= span:
        return
    grid = Grid(*sizes)
    ours = Patches(grid, size, stride=stride, counts=counts, start=-padding, dilation=dilation).tokens
    theirs = unfolded(
        numbered(grid), kernel_size=size, stride=stride, padding=padding, dilation=dilation
    ).long()
    assert torch.equal(ours + 1, theirs)


@pytest.mark.parametrize(("sizes", "size", "dilation"), [((8, 13), 7, 1), ((9, 11), 3, 2), ((5, 4), 7, 1)])
def test_reflected_boxes_are_those_of_a_reflection_padded_unfold(sizes, size, dilation):
    grid, span = Grid(*sizes), dilation * (size - 1) + 1
    counts = [-(-n // span) for n in grid]
    ours = Patches(grid, size, stride=span, counts=counts, dilation=dilation, border="reflect").tokens
    below, right = (c * span - n for c, n in zip(counts, grid, strict=True))
    padded = functional.pad(numbered(grid)[None], (0, right, 0, below), mode="reflect")[0]
    assert torch.equal(ours + 1, unfolded(padded, kernel_size=size, stride=span, dilation=dilation).long())


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", [1, 3, 5])
def test_shifted_boxes_hold_the_keys_of_windows_moved_inside(block, ratio):
    grid, halo = Grid(6 * block, 5 * block), (ratio - 1) * block // 2
    boxes = Patches(grid, ratio * block, stride=block, counts=(6, 5), start=-halo, border="shift").tokens
    seen = Halo(grid, block, halo, border="clamp").dense()
    corners = Patches(grid, 1, stride=block, counts=(6, 5)).tokens.flatten()
    for box, corner in zip(boxes, corners, strict=True):
        assert box.unique().numel() == box.numel()
        assert torch.equal(box.sort().values, seen[corner].nonzero().flatten())


@pytest.mark.parametrize("sizes", [(7,), (4, 5), (3, 4, 5)])
def test_any_number_of_axes(sizes):
    grid = Grid(*sizes)
    boxes = Patches(grid, 2, stride=1, counts=[n - 1 for n in sizes])
    assert boxes.tokens.shape == (boxes.numel, 2**grid.ndim)
    coords = grid.coords()[boxes.tokens]
    assert (coords - coords[:, :1] == Grid(*[2] * grid.ndim).coords()).all()


def test_the_schedule_folds():
    grid = Grid(4, 5)
    schedule = Patches(grid, 3, stride=1, counts=(4, 5), start=-1).schedule().validate()
    inside = (schedule.groups[0].q_ids() >= 0).sum(-1)
    assert schedule.pairs_needed == int((inside**2).sum())
    assert schedule.combine == "sum"
    # An interior pixel meets itself in all the nine boxes that hold it, a corner in four.
    assert schedule.expand()[0, 0].diagonal().reshape(4, 5)[1, 1] == 9
    assert schedule.expand()[0, 0, 0, 0] == 4


def test_bad_arguments_are_named():
    grid = Grid(4, 5)
    for options, message in (
        ({"size": 0}, "^size"),
        ({"stride": 0}, "^stride"),
        ({"counts": (1, 2, 3)}, "^counts"),
        ({"border": "zero"}, "^border.*'mask', 'reflect', 'shift'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Patches(grid, **{"size": 2, "stride": 1, "counts": 1, **options})
    with pytest.raises(ArgumentError, match=r"^grid: .*more than 4 positions on axis 0"):
        Patches(grid, 8, stride=8, counts=1, border="reflect").tokens
    with pytest.raises(ArgumentError, match=r"^grid: .*at least 6 positions on axis 0"):
        Patches(grid, 6, stride=2, counts=2, start=-2, border="shift").tokens
