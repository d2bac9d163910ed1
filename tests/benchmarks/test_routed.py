"""The routed benchmark on a small problem, and its arithmetic."""

import pytest

from benchmarks import routed
from foveate.core.grid import Grid
from foveate.measure.timer import Timing


def test_it_runs_on_a_small_problem(capsys):
    small = ["--lengths", "64", "256", "--ladder", "128", "--repeats", "2", "--dim", "32", "--heads", "2"]
    small += ["--threads", "1"]
    assert routed.main([*small, "--only", "biformer", "routing_transformer"]) == 0
    printed = capsys.readouterr().out
    assert "| biformer | grid |" in printed
    assert "| routing_transformer | grid |" in printed
    assert "WRONG" not in printed
    assert "not timed" not in printed
    assert routed.main([*small, "--only", "nobody"]) == 1
    with pytest.raises(SystemExit):
        routed.main(["--lengths", "100"])


def test_a_wrong_system_is_not_timed(monkeypatch, capsys):
    class Red:
        ok, reason = False, "it errs"

    monkeypatch.setattr(routed, "check_mechanism", lambda *a, **k: Red())
    assert routed.main(["--only", "biformer"]) == 1
    assert "biformer: WRONG, nothing is timed; it errs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({1024: 0.5, 4096: 2.0}, "about 2000"),
        ({1024: 1.5, 4096: 2.0}, "below 1024"),
        ({1024: 0.5, 4096: 0.9}, "none up to 4096: slower than dense"),
        ({1024: 1.5, 2048: 0.8, 4096: 1.25}, "about 2900"),
        ({}, "not timed"),
    ],
)
def test_the_crossover_is_interpolated_between_lengths(ratios, said):
    entry = routed.Entry("x", "grid", {(n, "f"): (r, "") for n, r in ratios.items()})
    assert entry.crossover("f") == said


def test_slower_is_said():
    entry = routed.Entry("x", "grid", {(64, "f"): (0.5, "[0.4..0.6]")})
    assert entry.cell(64, "f") == "0.50x [0.4..0.6]  slower than dense"
    assert entry.cell(64, "fb") == "not timed"


def test_ratios_and_grids():
    ratio, spread = routed.ratio_of(Timing((4.0, 6.0, 5.0)), Timing((2.0, 2.0, 2.5)))
    assert ratio == pytest.approx(2.5)
    assert spread == "[2.00..3.00]"
    assert routed.grid_of(4096, "grid") == Grid(64, 64)
    assert routed.grid_of(8192, "grid") == Grid(64, 128)
    assert routed.grid_of(4096, "causal") == Grid(4096)


def test_what_takes_too_long_is_named_and_not_tried_at_more_tokens(capsys):
    small = [
        "--lengths",
        "64",
        "256",
        "--ladder",
        "--repeats",
        "1",
        "--dim",
        "32",
        "--heads",
        "2",
        "--longest",
        "0",
    ]
    assert routed.main([*small, "--only", "biformer"]) == 0
    printed = capsys.readouterr().out
    assert "biformer, N = 64: a step takes" in printed
    assert "at 64 already, left out" in printed
    assert "not timed" in printed
