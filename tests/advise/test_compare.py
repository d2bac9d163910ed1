import json
import time

import pytest

from foveate.advise import compare as compare_module
from foveate.advise import shapes
from foveate.advise.compare import compare
from foveate.advise.report import render
from foveate.advise.settings import Shape
from foveate.core.errors import FoveateError
from foveate.kernels.cpu.library import absent
from foveate.measure.schema import validate
from tests.advise.tiny import Tiny

TINY = Shape(grid=(40, 40), heads=2, head_dim=4)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_REPEATS", 3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(compare_module, "make_workload", lambda key, **_: Tiny(causal=key == "text"))


def by_key(found, workload):
    return {row["mechanism"]: row for row in found.rows if row["workload"] == workload}


def test_shapes_measures_refuses_and_fails_each_in_its_row(toys, tmp_path):
    events = []
    found = compare(
        ["shapes"], mechanisms=toys, shape=TINY, budget_s=60, out=tmp_path / "o", listener=events.append
    )
    on_disk = json.loads((tmp_path / "o" / "results.json").read_text())
    assert validate(on_disk) == []
    assert on_disk == found.document
    assert found.status == "complete"
    rows = by_key(found, "shapes")
    assert {key: row["status"] for key, row in rows.items()} == {
        "full_attention": "measured",
        "toy_good": "measured",
        "toy_not_causal": "measured",
        "toy_cheats": "measured",
        "toy_refuses": "refused",
        "toy_wrong": "failed",
        "toy_explodes": "failed",
    }
    assert "at 40×40: RuntimeError: out of memory" in rows["toy_explodes"]["reason"]
    assert rows["toy_explodes"]["points"]
    good, dense = rows["toy_good"], rows["full_attention"]
    assert good["forward_ms"] > 0
    assert good["backward_ms"] > 0
    assert good["memory_bytes"] > 40**4 * 4
    assert good["flops"] > dense["params"] * 1600
    assert good["speedup"] == pytest.approx(dense["step_ms"] / good["step_ms"])
    assert good["speedup_bound"] == pytest.approx(dense["flops"] / good["flops"])
    assert [p["tokens"] for p in good["points"]] == [64, 256, 576, 1600]
    assert good["exponent"] is not None
    assert isinstance(good["slower_than_dense"], list)
    assert found.best in rows
    kinds = [event.kind for event in events]
    assert kinds[0] == "begin"
    assert kinds[-1] == "end"
    assert "progress" in kinds


def test_learning_races_and_times_the_networks(toys, tiny, tmp_path):
    found = compare(
        ["image"], mechanisms=["toy_good", "toy_wrong", "toy_not_causal"], budget_s=4, out=tmp_path
    )
    assert validate(found.document) == []
    assert found.errors == {}
    rows = by_key(found, "image")
    assert rows["toy_wrong"]["status"] == "failed"
    for key in ("toy_good", "toy_not_causal", "full_attention"):
        row = rows[key]
        assert row["status"] == "measured", row["reason"]
        assert row["quality"] > 0.3
        assert row["forward_ms"] > 0
        assert row["memory_bytes"] > 0
        assert row["params"] > row["mixer_params"] > 0
        assert row["curve"]
        assert row["steps"] > 0
        assert row["resolved"] in (True, False)
    assert found.document["workloads"]["image"]["floor"] == 0.5
    assert found.document["races"]["image"]["complete"]
    assert not (tmp_path / ".checkpoints").exists()
    assert found.recommendations[0]["workload"] == "image"
    assert "toy_good" in found.table("image")


def test_causal_workloads_refuse_those_that_see_the_future(toys, tiny):
    found = compare(["text"], mechanisms=["toy_good", "toy_not_causal", "toy_cheats"], budget_s=3)
    rows = {r["mechanism"]: r for r in found.rows if r["workload"] == "text"}
    assert rows["toy_not_causal"]["reason"] == "not causal: its windows hold later tokens"
    assert rows["toy_cheats"]["reason"].startswith("not causal: changing")
    # Keys and values of 16 tokens and 8 channels in one layer; the toy cannot decode.
    assert rows["full_attention"]["state_bytes"] == 2 * 16 * 8 * 4
    assert rows["toy_good"]["state_bytes"] is None
    assert validate(found.document) == []


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(toys, tmp_path):
    options = {"mechanisms": ["toy_good"], "shape": TINY, "out": tmp_path}

    def interrupt(event):
        if event.kind == "row" and event.row["mechanism"] == "full_attention":
            raise KeyboardInterrupt

    found = compare(["shapes"], budget_s=60, listener=interrupt, **options)
    assert found.status == "interrupted"
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert validate(on_disk) == []
    assert on_disk["status"] == "interrupted"
    assert by_key(found, "shapes")["full_attention"]["status"] == "measured"
    assert len(by_key(found, "shapes")["full_attention"]["points"]) == 1

    found = compare(["shapes"], budget_s=60, resume=True, **options)
    assert found.status == "complete"
    assert len(by_key(found, "shapes")["full_attention"]["points"]) == 4

    begin = time.perf_counter()
    again = compare(["shapes"], budget_s=60, resume=True, **options)
    assert time.perf_counter() - begin < 1.0
    assert again.rows == found.rows


def test_ctrl_c_during_a_race_keeps_its_evaluations(toys, tiny, tmp_path):
    seen = []

    def interrupt(event):
        if event.kind == "progress" and "accuracy" in event.message:
            seen.append(event)
            if len(seen) == 3:
                raise KeyboardInterrupt

    options = {"mechanisms": ["toy_good"], "out": tmp_path}
    found = compare(["image"], budget_s=5, listener=interrupt, **options)
    assert found.status == "interrupted"
    assert validate(found.document) == []
    assert any(row["quality"] is not None for row in found.rows)
    evaluations = len(found.document["races"]["image"]["mechanisms"]["toy_good"]["curve"])
    again = compare(["image"], budget_s=4, resume=True, **options)
    assert again.status == "complete"
    assert len(again.document["races"]["image"]["mechanisms"]["toy_good"]["curve"]) >= evaluations


def test_resume_refuses_another_run(toys, tmp_path):
    options = {"mechanisms": ["toy_good"], "budget_s": 1, "out": tmp_path, "resume": True}
    with pytest.raises(FoveateError, match="no run to go on with"):
        compare(["shapes"], shape=TINY, **options)
    compare(["shapes"], shape=TINY, **(options | {"resume": False}))
    with pytest.raises(FoveateError, match="made with seed=0, now seed=1"):
        compare(["shapes"], shape=TINY, seed=1, **options)
    with pytest.raises(FoveateError, match="give out"):
        compare(["shapes"], resume=True)


def test_a_workload_that_breaks_does_not_stop_the_others(toys, monkeypatch):
    def broken(key, **_):
        raise OSError("the data is gone")

    monkeypatch.setattr(compare_module, "make_workload", broken)
    found = compare(["image", "shapes"], mechanisms=["toy_good"], shape=TINY, budget_s=60)
    assert found.errors == {"image": "OSError: the data is gone"}
    assert by_key(found, "shapes")["toy_good"]["status"] == "measured"
    assert validate(found.document) == []


def test_threads_are_set_for_the_run_only(toys):
    import torch

    before = torch.get_num_threads()
    found = compare(["shapes"], mechanisms=["toy_good"], shape=TINY, budget_s=1, threads=1)
    assert found.document["fingerprint"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_what_ran_on_the_core_is_timed_on_tiles_too(tmp_path):
    shape = Shape(grid=(48, 48), heads=2, head_dim=16)
    found = compare(["shapes"], mechanisms=["swin"], shape=shape, budget_s=30, out=tmp_path)
    assert validate(found.document) == []
    rows = by_key(found, "shapes")
    assert rows["full_attention"]["backends"] == ["sdpa"]
    assert "core_gain" not in rows["full_attention"]
    swin = rows["swin"]
    assert swin["backends"] == (["tiles"] if absent() else ["cpu"])
    assert ("core_gain" in swin) == (absent() is None)
    page = render(found.document)
    assert ("core vs tiles" in page) == (absent() is None)


def test_a_budget_that_is_spent_before_a_race_can_begin(toys, tiny):
    found = compare(["image"], mechanisms=["toy_good"], budget_s=0.001)
    assert "budget: expected seconds that last until image can begin" in found.errors["image"]
    assert validate(found.document) == []
