"""Crossovers: measured ones where two sizes enclose them, predicted ones from counted operations."""

import pytest
import torch

from foveate.advise import shapes
from foveate.advise.admit import Site
from foveate.advise.compare import compare
from foveate.advise.crossover import crossed, crossing_words, price
from foveate.advise.settings import Shape
from foveate.core.grid import Grid
from foveate.core.registry import get_system
from foveate.kernels.flops import count_flops
from foveate.measure.schema import validate
from foveate.models.backbone import build_mixer


def points(*speedups):
    return [{"tokens": 64 * 4**i, "speedup": s} for i, s in enumerate(speedups)]


def test_a_power_law_is_met_exactly():
    # speedup = (N / 500) ** 0.7
    ladder = [{"tokens": n, "speedup": (n / 500) ** 0.7} for n in (64, 256, 1024, 4096)]
    assert crossed(ladder) == pytest.approx(500)
    assert crossing_words({"crossover_measured": crossed(ladder), "points": ladder}) == "500"


@pytest.mark.parametrize(
    ("speedups", "low", "high"),
    [
        ((0.5, 2.0), 128, 128),
        ((0.5, 1.0, 3.0), 256, 256),
        ((0.5, 0.9, 1.1), 256, 1024),
        # Faster, slower, faster: only the last passage keeps its word.
        ((1.2, 0.8, 1.25), 512, 512),
    ],
)
def test_it_is_the_last_passage(speedups, low, high):
    found = crossed(points(*speedups))
    assert low - 1e-6 <= found <= high + 1e-6


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ((0.2, 0.5, 0.9), "not up to 1,024, the longest"),
        ((0.5, 1.5, 0.9), "not up to 1,024, the longest"),
        ((1.1, 1.5), "faster from 64, the shortest, on"),
        ((0.7,), "not up to 64, the longest"),
        ((), "not timed beside it"),
    ],
)
def test_what_is_not_enclosed_is_said_and_has_no_number(speedups, said):
    assert crossed(points(*speedups)) is None
    assert crossing_words({"crossover_measured": None, "points": points(*speedups)}) == said


def test_sizes_without_full_attention_beside_them_do_not_count():
    ladder = [{"tokens": 16}, *points(0.5, 2.0), {"tokens": 10**6}]
    assert crossed(ladder) == pytest.approx(128)


def test_the_prediction_is_where_counted_operations_change_order():
    site = Site(dim=64, heads=4, grid=Grid(16, 16))
    found = price(get_system("lightning_attention"), site)
    assert found["state_bytes"] == 4 * 16 * 16 * 4
    n = found["crossover_predicted"]
    dense = build_mixer("full_attention", dim=64, grid=Grid(n), heads=4)
    assert count_flops(dense, torch.randn(1, n, 64), Grid(n)) > n * found["flops_per_token"]
    shorter = Grid(n - 1)
    assert count_flops(dense, torch.randn(1, n - 1, 64), shorter) <= (n - 1) * found["flops_per_token"]


def test_who_looks_both_ways_has_no_state_and_who_does_not_scan_no_price():
    site = Site(dim=64, heads=4, grid=Grid(16, 16))
    assert price(get_system("rala"), site)["state_bytes"] is None
    assert price(get_system("rala"), site)["crossover_predicted"] > 1
    # Its state spaces are no products of matrices.
    assert set(price(get_system("mhs_vm"), site).values()) == {None}
    assert price(get_system("swin"), site) == {}


def test_shapes_writes_both(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_REPEATS", 3)
    shape = Shape(grid=(24, 24), heads=2, head_dim=16)
    found = compare(["shapes"], mechanisms=["lightning_attention_2", "swin"], shape=shape, budget_s=20)
    assert validate(found.document) == []
    rows = {row["mechanism"]: row for row in found.rows}
    row = rows["lightning_attention_2"]
    assert row["status"] == "measured", row["reason"]
    assert row["state_bytes"] == 2 * 16 * 16 * 4
    assert row["flops_per_token"] > 0
    assert row["crossover_predicted"] > 1
    assert row["crossover_measured"] == crossed(row["points"])
    for key in ("swin", "full_attention"):
        assert "crossover_predicted" not in rows[key]
        assert "state_bytes" not in rows[key]
