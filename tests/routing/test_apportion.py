"""Apportionment: sums, corrections, and shares that say nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.routing.apportion import apportion


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=9), st.integers(0, 40), st.booleans())
def test_counts_add_up_and_are_never_negative(shares, total, random):
    counts = apportion(torch.tensor(shares), total, random=random)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [
        ([1.0, 1.0, 2.0], 8, [2, 2, 4]),
        ([1.0, 1.0, 1.0], 8, [2, 3, 3]),  # 3, 3, 3 rounded: one is taken from the first of the largest
        ([1.0, 1.0, 1.0], 4, [2, 1, 1]),  # 1, 1, 1 rounded: one is given to the first of the smallest
        ([0.0, 3.0], 5, [0, 5]),
        ([0.0, 0.0], 4, [2, 2]),
        ([float("nan"), 1.0], 4, [2, 2]),
        ([float("inf"), 1.0], 2, [1, 1]),
    ],
)
def test_rounding_is_corrected_at_the_extremes(shares, total, expected):
    assert apportion(torch.tensor(shares), total).tolist() == expected


def test_random_corrections_follow_the_generator():
    shares = torch.ones(7)
    draws = [
        apportion(shares, 16, random=True, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2, 3, 4)
    ]
    assert draws[0].equal(draws[1])
    assert any(not draws[0].equal(other) for other in draws[2:])
    assert all(d.sum() == 16 for d in draws)


@pytest.mark.parametrize(
    ("shares", "total", "name"),
    [(torch.ones(2, 2), 4, "shares"), (torch.ones(0), 4, "shares"), (torch.tensor([-1.0, 3.0]), 4, "shares"),
     (torch.ones(3), -1, "total"), (torch.ones(3).long(), 1, "shares")],
)  # fmt: skip
def test_bad_arguments_are_named(shares, total, name):
    with pytest.raises(ArgumentError, match=name):
        apportion(shares, total)
