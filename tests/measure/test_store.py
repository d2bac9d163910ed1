import json

import pytest

from foveate.measure import store as store_module
from foveate.measure.schema import validate
from foveate.measure.store import Store, StoreError, empty_row


def measured(workload="image", mechanism="a", **more):
    return empty_row(workload, mechanism, "measured", forward_ms=1.0, **more)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out" / "results.json", fingerprint={"cpu": "x"}, settings={"seed": 0})


def test_every_put_leaves_a_valid_file(store):
    store.put(measured())
    on_disk = json.loads(store.path.read_text())
    assert validate(on_disk) == []
    store.put(empty_row("image", "b", "failed", "RuntimeError: no"))
    assert [row["mechanism"] for row in json.loads(store.path.read_text())["rows"]] == ["a", "b"]
    assert [p.name for p in store.path.parent.iterdir()] == ["results.json"]


def test_put_replaces_the_same_workload_and_mechanism(store):
    store.put(measured())
    store.put(measured(mechanism="b"))
    store.put(measured(quality=0.5))
    assert [(r["mechanism"], r["quality"]) for r in store.rows] == [("a", 0.5), ("b", None)]
    assert store.row("image", "b") is store.rows[1]
    assert store.row("text", "a") is None


def test_nan_becomes_null(store):
    store.put(measured(quality=float("nan"), points=({"grid": (4, 4)},)))
    assert store.rows[0]["quality"] is None
    assert store.rows[0]["points"] == [{"grid": [4, 4]}]


def test_a_crash_while_writing_keeps_the_old_file(store, monkeypatch):
    store.put(measured())
    before = store.path.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.put(measured(mechanism="b"))
    assert store.path.read_text() == before
    assert [p.name for p in store.path.parent.iterdir()] == ["results.json"]


def test_load_goes_on_where_it_stopped(store):
    store.put(measured())
    store.update(races={"image": {"x": 1}})
    again = Store.load(store.path)
    assert again.rows == store.rows
    assert again.document["races"] == {"image": {"x": 1}}
    again.put(measured(mechanism="b"))
    assert len(Store.load(store.path).rows) == 2


def test_load_refuses_what_it_cannot_read(tmp_path, store):
    with pytest.raises(StoreError, match="no run to go on with"):
        Store.load(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        Store.load(tmp_path / "results.json")
    store.document["rows"] = [{"workload": "image"}]
    store.save()
    with pytest.raises(StoreError, match=r"rows\[0\].mechanism: missing"):
        Store.load(store.path)


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None, fingerprint={}, settings={})
    store.put(measured())
    assert list(tmp_path.iterdir()) == []


def test_changes_made_together_are_written_once(store, monkeypatch):
    written = []
    monkeypatch.setattr(store_module, "write_atomically", lambda path, text: written.append(json.loads(text)))
    with store.together():
        store.put(measured())
        store.put(measured(mechanism="b"))
        store.update(races={"image": {}})
        assert not written
    assert [[row["mechanism"] for row in document["rows"]] for document in written] == [["a", "b"]]
    store.put(measured(mechanism="c"))
    assert len(written) == 2


def test_changes_made_before_an_interruption_are_written(store):
    def interrupted():
        with store.together():
            store.put(measured())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [row["mechanism"] for row in json.loads(store.path.read_text())["rows"]] == ["a"]


def test_a_finished_run_can_be_read_by_people(store):
    store.put(measured())
    assert store.path.read_text().count("\n") == 1
    store.update(status="complete")
    assert store.path.read_text().count("\n") > 20
