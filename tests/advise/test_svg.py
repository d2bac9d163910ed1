from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.advise.svg import (
    Scale,
    byte_ticks,
    byte_words,
    milliseconds,
    number,
    place_labels,
    spread_apart,
)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.5, "0.5"), (1e9, "1.00e+09")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_units():
    assert milliseconds(1500) == "1.5 s"
    assert milliseconds(12.34) == "12.3 ms"
    assert milliseconds(0.05) == "50 µs"
    assert byte_words(2048) == "2 KiB"
    assert byte_words(3 * 2**30) == "3 GiB"


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8), st.booleans())
def test_scales_hold_their_values_and_have_ticks(values, log):
    scale = Scale.over(values, 10.0, 210.0, log=log)
    for value in values:
        assert 10.0 <= scale(value) <= 210.0
    ticks = scale.ticks()
    assert all(scale.low <= t <= scale.high * (1 + 1e-9) for t in ticks)
    assert len(ticks) <= 40


def test_byte_ticks_are_powers_of_two():
    ticks = byte_ticks(Scale(1e6, 1e9, 0, 1, log=True))
    assert 3 <= len(ticks) <= 7
    assert all(int(t) & (int(t) - 1) == 0 for t in ticks)


@given(st.lists(st.floats(0, 400), min_size=1, max_size=12))
def test_labels_at_the_end_of_lines_do_not_overlap(wanted):
    placed = spread_apart(wanted, 15.0, 0.0, 400.0)
    ordered = sorted(placed)
    assert all(b - a >= 15.0 - 1e-6 for a, b in pairwise(ordered))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert [placed[i] for i in order] == ordered


def test_labels_stay_in_the_frame_and_apart():
    points = [(100.0, 100.0, "first label"), (104.0, 101.0, "second label"), (390.0, 100.0, "third label")]
    places = place_labels(points, (0.0, 0.0, 400.0, 200.0))
    assert places[2][2] == "end"
    assert places[0] != places[1]
