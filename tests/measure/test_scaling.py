import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.measure.scaling import fit_exponent


@given(st.floats(0.2, 3.0), st.floats(1e-3, 1e3))
def test_finds_the_exponent_of_a_power_law(p, c):
    sizes = [64, 256, 1024, 4096]
    found = fit_exponent(sizes, [c * n**p for n in sizes])
    assert found.value == pytest.approx(p, abs=1e-9)
    assert found.se == pytest.approx(0.0, abs=1e-6)
    assert found.points == 3


def test_small_sizes_do_not_count():
    found = fit_exponent([1, 100, 200, 400], [50.0, 100.0, 200.0, 400.0])
    assert found.value == pytest.approx(1.0)


def test_spread_of_the_measurements_becomes_a_standard_error():
    tight = fit_exponent([10, 100, 1000], [1, 10, 100], [0.0] * 3)
    loose = fit_exponent([10, 100, 1000], [1, 10, 100], [0.2, 2.0, 20.0])
    assert tight.se == pytest.approx(0.0, abs=1e-9)
    by_hand = 0.2 / 1.349 / (math.sqrt(2) * math.log(10))
    assert loose.se == pytest.approx(by_hand)


def test_too_few_or_wrong_points():
    assert fit_exponent([10], [1.0]) is None
    assert fit_exponent([10, 10], [1.0, 2.0]) is None
    assert fit_exponent([10, 100], [1.0, 2.0]).se is None
    with pytest.raises(ValueError, match="cost"):
        fit_exponent([10, 100], [1.0, 0.0])
    with pytest.raises(ValueError, match="cost"):
        fit_exponent([10, 100], [1.0])
