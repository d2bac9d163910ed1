"""Races of stand-in mixers on a toy workload."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.advise import race as race_module
from foveate.advise.field import FINALISTS, GROWTH, MIN_STEPS, field_sizes, fitting, shares
from foveate.advise.race import race
from foveate.advise.records import RaceResult
from foveate.core.errors import ArgumentError
from foveate.tasks import train as train_module
from tests.tasks.stand_ins import Toy, build


class Clock:
    """Stands in for the module `time`: a training batch takes 0.02 s, a test batch 0.01 s."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Races take the same steps on any machine."""
    clock = Clock()
    batch, test_batches = Toy.batch, Toy.test_batches

    def timed_batch(self, step, **options):
        clock.now += 0.02
        return batch(self, step, **options)

    def timed_test(self, size):
        for found in test_batches(self, size):
            clock.now += 0.01
            yield found

    monkeypatch.setattr(race_module, "time", clock)
    monkeypatch.setattr(train_module, "time", clock)
    monkeypatch.setattr(Toy, "batch", timed_batch)
    monkeypatch.setattr(Toy, "test_batches", timed_test)


def run(keys, **options):
    options = {"budget_s": 6.0, "seeds": 2, "build": build} | options
    return race(Toy(), keys, **options)


@given(st.integers(1, 60), st.integers(1, 6))
def test_fields_shrink_to_the_finalists(n, finalists):
    sizes = field_sizes(n, finalists)
    assert sizes[0] == n
    assert sizes[-1] == min(n, finalists)
    assert sorted(set(sizes), reverse=True) == sizes
    assert len(sizes) in GROWTH


def test_shares_leave_time_for_the_finalists_seeds():
    assert shares([3], 3) == [1.0]
    # 12 + 6 * 0.25 + (3 * 0.25 + 2 * 3 * 1.5): the last rung takes whatever is left.
    assert shares([12, 6, 3], 3) == pytest.approx([12 / 23.25, 1.5 / 11.25, 1.0])


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.1, 9.0), min_size=1), st.floats(0.0, 30.0))
def test_a_field_fits_its_time_beyond_the_finalists(seconds, left):
    def family(key):
        return "baseline" if key == "d" else str(ord(key) % 3)

    kept = fitting(seconds, left, family)
    assert len(kept) == len(set(kept)) >= min(FINALISTS, len(seconds))
    assert sum(seconds[key] for key in kept) <= left + 1e-9 or len(kept) == min(FINALISTS, len(seconds))
    assert ("d" in seconds) == (kept[0] == "d")
    turn = {family(key) for key in kept if key != "d"}
    waiting = {family(key) for key in seconds if key != "d"} - turn
    # No family sends two while another that would have been no dearer sends nobody.
    assert (
        not waiting
        or len(turn) == 0
        or all(
            min(seconds[k] for k in seconds if family(k) == name) > left - sum(seconds[k] for k in kept)
            for name in waiting
        )
    )


def test_a_race_keeps_equal_steps_and_records_refusals_and_failures():
    events = []
    keys = ["dense", "picky", "mean", "crash", "nothing", "explode"]
    result = run(keys, on_event=events.append)
    rows = result.mechanisms
    assert result.complete
    assert list(rows) == keys
    assert rows["picky"].status == "refused"
    assert "seven dimensions" in rows["picky"].reason
    assert rows["crash"].status == "failed"
    assert "boom" in rows["crash"].reason
    assert rows["explode"].status == "failed"
    assert "loss became" in rows["explode"].reason
    finished = [r for r in rows.values() if r.status == "finished"]
    assert {r.key for r in finished} == {"dense", "mean", "nothing"}
    assert len({r.steps for r in finished}) == 1
    assert all(r.seeds == [0, 1] for r in finished)
    assert all(r.params > r.mixer_params >= 0 for r in finished)
    assert rows["dense"].mixer_params > 0
    assert all(r.quality_se > 0 and "half" in r.parts for r in finished)
    assert result.floor_name == "majority"
    kinds = [e.kind for e in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert {"refused", "failed", "rung", "progress", "finished"} <= set(kinds)
    assert all(0 <= e.fraction <= 1 for e in events)


def test_halving_cuts_at_equal_steps(monkeypatch):
    monkeypatch.setattr(race_module, "fitting", lambda *given: fitting(*given, finalists=1))
    monkeypatch.setattr(race_module, "field_sizes", lambda n: field_sizes(n, 1))
    result = run(["nothing", "dense", "mean"], budget_s=8.0)
    rows = result.mechanisms
    assert len(result.rungs) == 3
    assert result.rungs == sorted(result.rungs)
    cut = [r for r in rows.values() if r.status == "eliminated"]
    assert len(cut) == 2
    assert rows["nothing"].status == "eliminated"  # it cannot see the other tokens
    for row in cut:
        assert row.measured
        assert row.steps in result.rungs[:2]
        assert "not among the best" in row.reason
    # The same batches for everybody: every mechanism has points at the first rung's steps.
    assert all(r.at(result.rungs[0]) for r in rows.values())


def test_records_survive_json():
    result = run(["mean", "picky"], budget_s=0.5)
    again = RaceResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict()
    assert again.mechanisms["mean"].curve == result.mechanisms["mean"].curve
    assert not again.mechanisms["picky"].measured


@pytest.mark.parametrize("how", ["event", "callable", "ctrl-c"])
def test_stopping_keeps_what_was_measured_and_resuming_goes_on(tmp_path, how):
    stop = threading.Event()

    def watch(event):
        if event.result is not None and event.result.key == "mean" and event.result.curve:
            if how == "ctrl-c":
                raise KeyboardInterrupt
            stop.set()

    ways = {"event": stop, "callable": stop.is_set, "ctrl-c": None}
    first = run(["mean", "dense"], on_event=watch, stop=ways[how], checkpoints=tmp_path)
    assert not first.complete
    assert first.mechanisms["mean"].measured
    assert first.mechanisms["mean"].status == "interrupted"
    stored = RaceResult.from_dict(json.loads(json.dumps(first.to_dict())))
    old = [p for r in stored.mechanisms.values() for p in r.curve]
    second = run(["mean", "dense"], resume=stored, checkpoints=tmp_path, budget_s=first.spent_s + 3.0)
    assert second.complete
    new = [p for r in second.mechanisms.values() for p in r.curve]
    assert all(p in new for p in old)
    assert len({r.steps for r in second.mechanisms.values()}) == 1
    assert second.spent_s > first.spent_s


def test_a_stored_state_continues_exactly(tmp_path):
    """Without checkpoints the unfinished rung is trained again, to the same numbers."""
    stop = threading.Event()
    first = run(["dense"], stop=stop, on_event=lambda e: stop.set() if e.result and e.result.curve else None)
    point = first.mechanisms["dense"].curve[0]
    fresh = RaceResult.from_dict(first.to_dict())
    fresh.mechanisms["dense"].curve.clear()
    fresh.mechanisms["dense"].curve.append(point)
    second = run(["dense"], resume=fresh, budget_s=first.spent_s + 2.0)
    assert second.mechanisms["dense"].steps >= point.step
    assert point in second.mechanisms["dense"].curve


def test_the_budget_holds():
    result = run(["dense", "mean", "nothing"], budget_s=9.0, seeds=3)
    assert 7.0 < result.spent_s < 9.2


def test_the_least_budget_still_scores_everybody_once():
    result = run(["dense", "mean", "nothing"], budget_s=0.01, seeds=1)
    assert result.complete
    assert {r.steps for r in result.mechanisms.values()} == {2 + race_module.CALIBRATION}


@pytest.mark.parametrize(
    ("keys", "options", "name"),
    [
        ([], {}, "keys"),
        (["mean", "mean"], {}, "keys"),
        (["mean"], {"budget_s": 0}, "budget_s"),
        (["mean"], {"seeds": 0}, "seeds"),
    ],
)
def test_bad_arguments_are_named(keys, options, name):
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        run(keys, **options)


def test_resuming_another_race_is_refused():
    result = run(["mean"], budget_s=0.2)
    result.workload = "other"
    with pytest.raises(ArgumentError, match="resume"):
        run(["mean"], resume=result)


def test_a_budget_races_as_many_as_it_gives_enough_steps(monkeypatch):
    keys = ["mean", "mean2", "mean3", "mean4", "mean5", "mean6", "mean7", "mean8"]
    monkeypatch.setattr(race_module, "_family", lambda key: "odd" if key in ("mean3", "mean7") else "even")

    def make(key, spec, *, seed):
        return build("mean", spec, seed=seed)

    found = run(keys, build=make, budget_s=8.0)
    out = [key for key, record in found.mechanisms.items() if record.status == "refused"]
    assert 0 < len(out) <= len(keys) - FINALISTS
    assert all("left out: this budget gives 40 steps" in found.mechanisms[key].reason for key in out)
    raced = [key for key in keys if key not in out]
    assert {race_module._family(key) for key in raced} == {"odd", "even"}
    assert all(found.mechanisms[key].steps >= 0.7 * MIN_STEPS for key in raced)
    everybody = run(keys, build=make, budget_s=18.0)
    assert not [r for r in everybody.mechanisms.values() if r.status == "refused"]
