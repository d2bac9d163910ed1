from foveate.core.grid import Grid
from foveate.measure.reach import reach_levels
from tests.measure.toys import gate_toy, toy


def test_a_local_pattern_shows_exactly_its_tokens():
    levels = reach_levels(toy(grid=Grid(15), radius=2), token=7)
    assert [i for i, level in enumerate(levels) if level] == [5, 6, 7, 8, 9]


def test_full_attention_shows_everything_and_the_middle_is_the_default():
    levels = reach_levels(toy(grid=Grid(4, 5)))
    assert len(levels) == 20
    assert all(1 <= level <= 9 for level in levels)
    causal = reach_levels(toy(grid=Grid(4, 5), causal=True))
    middle = 2 * 5 + 2
    assert [i for i, level in enumerate(causal) if level] == list(range(middle + 1))


def test_spatial_modules_have_a_picture_too():
    levels = reach_levels(gate_toy(Grid(5, 5)))
    assert [i for i, level in enumerate(levels) if level] == [6, 7, 8, 11, 12, 13, 16, 17, 18]
