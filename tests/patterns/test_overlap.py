"""Overlapping boxes: every token in some box, the last one moved inside, and means over boxes."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.overlap import overlap_starts, overlap_tokens, overlapping
from foveate.patterns.schedule import Weights


def test_starts():
    assert overlap_starts(9, 5, 3) == [0, 3, 4]
    assert overlap_starts(11, 5, 3) == [0, 3, 6]
    assert overlap_starts(5, 5, 3) == [0]


@pytest.mark.parametrize(
    ("grid", "size", "stride"), [(Grid(9, 11), 5, 3), (Grid(7), 3, 2), (Grid(4, 5, 3), 3, 3)]
)
def test_boxes_hold_consecutive_tokens_and_cover_the_grid(grid, size, stride):
    ids = overlap_tokens(grid, size, stride)
    assert ids.unique().numel() == grid.numel
    inside = Grid(*(size,) * grid.ndim).coords()
    for box in ids:
        coords = grid.coords()[box]
        assert coords.sub(coords[0]).equal(inside)


def test_a_box_of_the_whole_grid_is_full_attention_and_others_average():
    grid = Grid(5, 6)
    x = torch.randn(1, 2, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(attend(x, x, x, where=overlapping(grid, (5, 6), 3)), attend(x, x, x))
    schedule = overlapping(grid, 4, 2).validate()
    ids = overlap_tokens(grid, 4, 2)
    total, count = torch.zeros_like(x), torch.zeros(30, dtype=x.dtype)
    for box in ids:
        part = x[:, :, box]
        total[:, :, box] += attend(part, part, part)
        count[box] += 1
    torch.testing.assert_close(attend(x, x, x, where=schedule), total / count[:, None])


def test_schedules_are_kept_unless_they_hold_tensors():
    grid = Grid(5, 6)
    assert overlapping(grid, 4, 2) is overlapping(grid, (4, 4), [2, 2])
    assert overlapping(grid, 4, 2) is not overlapping(grid, 4, 2, "sum")
    halves = Weights(torch.full((1, 1, 4, 16), 0.5))
    x = torch.randn(1, 2, 30, 4, dtype=torch.float64)
    summed = attend(x, x, x, where=overlapping(grid, 4, 2, "sum"))
    torch.testing.assert_close(attend(x, x, x, where=overlapping(grid, 4, 2, halves)), summed / 2)


@pytest.mark.parametrize(
    ("size", "stride", "name"), [(0, 1, "size"), (7, 1, "size"), (4, 0, "stride"), (4, 5, "stride")]
)
def test_bad_arguments_are_named(size, stride, name):
    with pytest.raises(ArgumentError, match=name):
        overlapping(Grid(6, 6), size, stride)
