"""The statistics on synthetic numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.advise.ranking import (
    NOT_RESOLVED,
    Scored,
    beats,
    combined,
    pareto,
    pooled_sd,
    quality_at,
    quality_error,
    standings,
    survivors,
)

finite = st.floats(-100, 100)


def test_noise_adds_in_squares_and_unknown_noise_counts_as_none():
    assert combined(3.0, 4.0) == 5.0
    assert combined(2.0, math.nan) == 2.0


def test_a_lead_counts_only_beyond_two_combined_errors():
    assert beats(0.60, 0.03, 0.49, 0.04)
    assert not beats(0.60, 0.03, 0.51, 0.04)
    assert beats(1.9, 0.01, 2.0, 0.01, higher_is_better=False)
    assert not beats(2.0, 0.01, 1.9, 0.01, higher_is_better=False)
    assert not beats(math.nan, 0.0, 0.0)


@given(finite, finite, st.floats(0, 10), st.floats(0, 10))
def test_two_cannot_beat_each_other(a, b, a_se, b_se):
    assert not (beats(a, a_se, b, b_se) and beats(b, b_se, a, a_se))
    assert beats(a, a_se, b, b_se) == beats(-a, a_se, -b, b_se, higher_is_better=False)


def test_spread_is_pooled_within_groups_only():
    # Far apart means, spread sqrt(2) within each pair; the single value says nothing.
    assert pooled_sd([[0.0, 2.0], [100.0, 102.0], [7.0]]) == pytest.approx(math.sqrt(2))
    assert math.isnan(pooled_sd([[1.0], [2.0]]))


def test_more_seeds_average_the_seeds_noise_but_not_the_examples():
    one, four = quality_error([0.1], 0.2), quality_error([0.1] * 4, 0.2)
    assert one == pytest.approx(math.hypot(0.1, 0.2))
    assert four == pytest.approx(math.hypot(0.1, 0.1))
    assert quality_error([0.1], math.nan) == pytest.approx(0.1)


def test_survivors_are_the_best_in_their_order():
    field = [Scored(k, q, 0.1, 5) for k, q in (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 3.0))]
    assert survivors(field, 2) == ["b", "d"]
    assert survivors(field, 2, higher_is_better=False) == ["a", "c"]
    assert survivors(field, 9) == ["a", "b", "c", "d"]


def test_standings_rank_ties_floor_and_steps():
    field = [
        Scored("best", 0.90, 0.01, 100),
        Scored("second", 0.80, 0.01, 100),
        Scored("twin", 0.79, 0.01, 100),
        Scored("lost", 0.51, 0.01, 100),
        Scored("early", 0.95, 0.01, 50),
    ]
    found = standings(field, 0.5)
    assert (found["best"].rank, found["best"].tied_with, found["best"].separated) == (1, [], True)
    assert (found["second"].rank, found["second"].tied_with) == (2, ["twin"])
    assert found["twin"].rank == 2
    assert not found["twin"].separated
    assert not found["lost"].resolved
    assert found["lost"].rank is None
    assert found["lost"].word == NOT_RESOLVED
    # Trained for fewer steps: resolved, but no rank among those trained longer.
    assert found["early"].resolved
    assert found["early"].rank is None
    assert found["second"].word == "2 (tied)"
    assert found["best"].word == "1"


@given(st.lists(st.tuples(finite, st.floats(0.001, 1)), min_size=1, max_size=8))
def test_standings_turn_over_with_the_direction(pairs):
    up = [Scored(str(i), q, se, 1) for i, (q, se) in enumerate(pairs)]
    down = [Scored(s.key, -s.quality, s.quality_se, 1) for s in up]
    assert standings(up, 0.0) == standings(down, 0.0, higher_is_better=False)


def test_pareto_front():
    points = [(1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (3.0, 0.7), (4.0, 0.9), (math.nan, 1.0)]
    assert pareto(points) == [0, 1, 4]
    assert pareto([(c, -q) for c, q in points], higher_is_better=False) == [0, 1, 4]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9))
def test_pareto_is_what_its_definition_says(points):
    front = pareto(points)
    for i, (c, q) in enumerate(points):
        dominated = any(c2 <= c and q2 >= q and (c2, q2) != (c, q) for c2, q2 in points)
        assert (i not in front) == dominated


def test_quality_at_a_time_is_interpolated_never_extrapolated():
    curve = [(2.0, 0.4), (1.0, 0.2), (4.0, 0.8)]
    assert quality_at(curve, 3.0) == pytest.approx(0.6)
    assert quality_at(curve, 4.0) == pytest.approx(0.8)
    assert math.isnan(quality_at(curve, 0.5))
    assert math.isnan(quality_at(curve, 5.0))
    assert math.isnan(quality_at([], 1.0))
