"""Which sizes and mechanisms a sweep leaves out when time is short."""

from types import SimpleNamespace

import pytest

from foveate.advise import shapes
from foveate.advise.compare import compare
from foveate.advise.settings import Shape
from foveate.core.grid import Grid


def runner(key, milliseconds, tokens=64):
    point = {"tokens": tokens, "forward_ms": milliseconds / 3, "backward_ms": milliseconds * 2 / 3}
    return shapes.Runner(SimpleNamespace(facts=SimpleNamespace(key=key)), [point])


def test_who_would_take_much_more_than_its_share_is_left_out():
    field = [runner(f"quick{i}", 1.0) for i in range(9)] + [runner("slow", 1000.0)]
    shapes._leave_out(field, Grid(16, 16), left=30.0)
    assert [r.key for r in field if r.refused] == ["slow"]
    assert field[-1].fault.startswith("left out at 16×16: about 55 s predicted, 18 s allowed")
    again = [runner("slow", 1000.0)]
    shapes._leave_out(again, Grid(16, 16), left=30.0)
    assert not again[0].refused  # alone it may have everything


def test_the_baseline_stays():
    field = [runner("full_attention", 1e6), runner("quick", 1.0)]
    shapes._leave_out(field, Grid(16, 16), left=1.0)
    assert not field[0].fault


def test_predictions_start_from_the_nearest_size():
    one = runner("a", 10.0)
    assert shapes._seconds(one, Grid(8, 8)) == pytest.approx(0.06)
    one.points.append({"tokens": 1024, "forward_ms": 10.0, "backward_ms": 10.0})
    assert shapes._seconds(one, Grid(32, 32)) == pytest.approx(0.12)


def test_the_users_size_comes_second(toys, monkeypatch):
    seen = []
    measure = shapes._measure_size

    def watch(runners, site, grid, **options):
        seen.append(grid.numel)
        return measure(runners, site, grid, **options)

    monkeypatch.setattr(shapes, "_measure_size", watch)
    monkeypatch.setattr(shapes, "MAX_REPEATS", 3)
    shape = Shape(grid=(40, 40), heads=2, head_dim=4)
    found = compare(["shapes"], mechanisms=["toy_good"], shape=shape, budget_s=60)
    assert seen == [64, 1600, 256, 576]
    row = next(row for row in found.rows if row["mechanism"] == "toy_good")
    assert [point["tokens"] for point in row["points"]] == [64, 256, 576, 1600]
    assert row["forward_ms"] == row["points"][-1]["forward_ms"]
