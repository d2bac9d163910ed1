import gc
import time

import pytest

from foveate.measure.timer import Timed, Timing, time_interleaved


def test_median_and_spread_are_quantiles():
    timing = Timing((4.0, 1.0, 3.0, 2.0, 100.0))
    assert timing.median_ms == 3.0
    assert timing.spread_ms == 2.0
    assert timing.repeats == 5
    assert Timing((7.0,)).spread_ms == 0.0


def test_rounds_are_interleaved_and_rotate_after_the_warm_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = time_interleaved(calls, warmup=1, min_repeats=3, max_repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: t.repeats for name, t in found.times.items()} == {"a": 3, "b": 3, "c": 3}


def test_times_are_wall_clock_and_preparation_is_off_the_clock():
    slow = Timed(run=lambda _: time.sleep(0.01), prepare=lambda: time.sleep(0.05))
    found = time_interleaved({"slow": slow, "idle": lambda: None}, warmup=0, min_repeats=3, max_repeats=3)
    assert 10 <= found.times["slow"].median_ms < 45
    assert found.times["idle"].median_ms < 5


def test_a_failing_callable_is_left_out_and_named():
    def fails():
        raise RuntimeError("no")

    found = time_interleaved({"bad": fails, "good": lambda: None}, max_repeats=3)
    assert list(found.times) == ["good"]
    assert str(found.errors["bad"]) == "no"


def test_a_callable_that_fails_later_has_no_time():
    count = []

    def later():
        count.append(1)
        if len(count) > 2:
            raise RuntimeError("out of memory")

    found = time_interleaved({"later": later, "good": lambda: None}, max_repeats=4)
    assert "later" not in found.times
    assert "later" in found.errors
    assert found.times["good"].repeats == 4


def test_budget_ends_rounds_but_not_before_the_minimum():
    nap = {"nap": lambda: time.sleep(0.01)}
    assert time_interleaved(nap, min_repeats=2, max_repeats=50, budget_s=0.0).times["nap"].repeats == 2
    assert time_interleaved(nap, min_repeats=1, max_repeats=6, budget_s=9.0).times["nap"].repeats == 6


def test_the_garbage_collector_is_off_during_and_on_again_after():
    seen = []
    time_interleaved({"a": lambda: seen.append(gc.isenabled())}, max_repeats=3)
    assert seen == [False] * 4
    assert gc.isenabled()


def test_rounds_are_reported():
    rounds = []
    time_interleaved({"a": lambda: None}, max_repeats=3, on_round=rounds.append)
    assert rounds == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "name"), [({"min_repeats": 0}, "min_repeats"), ({"max_repeats": 1}, "max_repeats")]
)
def test_wrong_counts_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        time_interleaved({"a": lambda: None}, **options)
