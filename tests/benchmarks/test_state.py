"""The benchmark of states on small problems: what is counted, what is drawn, and when nothing may be said."""

import pytest
import torch

from benchmarks import state as script
from benchmarks.state import Rung, Trained
from foveate.tasks.recall import RecallWorkload

SMALL = ["--pairs", "4", "--dim", "16", "--steps", "10", "--repeats", "1", "--threads", "1", "--test", "16",
         "--widths", "4", "--windows", "4"]  # fmt: skip


@pytest.fixture
def spec():
    return RecallWorkload(length=32, pairs=8, dim=16, heads=2).spec


def test_kept_bytes_follow_heads_and_windows(spec):
    full = Rung("full").bytes(spec)
    assert full == 2 * 2 * 32 * 16 * 4
    assert Rung("window", 32).bytes(spec) == full
    assert Rung("window", 8).bytes(spec) == full // 4
    assert [Rung("linear", d).bytes(spec) for d in (2, 4, 16)] == [2 * 16 * d * 4 for d in (2, 4, 16)]


def test_no_network_sees_the_future_and_a_window_sees_no_further_than_it_keeps(spec):
    ids = torch.randint(spec.in_features, (1, 32))
    for rung in (Rung("linear", 4), Rung("window", 6), Rung("full")):
        model = rung.build(spec).eval()
        out = model(ids)
        for at in (3, 17):
            changed = ids.clone()
            changed[:, at] = (ids[:, at] + 1) % spec.in_features
            moved = (model(changed) - out).abs().amax((0, 2)) > 0
            assert moved[at]
            assert not moved[:at].any()
            # The embedding looks one token back, and each of the two layers W - 1 further ones.
            reach = 1 + 2 * (rung.size - 1) if rung.family == "window" else 32
            assert not moved[at + reach + 1 :].any()
            assert moved[at : at + reach + 1].all()


def test_nothing_is_said_when_full_attention_has_not_learned(tmp_path, capsys):
    path = tmp_path / "state.svg"
    assert script.main([*SMALL, "--out", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "nothing is drawn" in printed
    assert "linear attention, D = 4" in printed
    assert not path.exists()


def test_what_was_trained_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", lambda rung, seed, options: Trained(10, 0.5, 0.9 + seed / 50))
    first, again = tmp_path / "state.svg", tmp_path / "again.svg"
    for path in (first, again):
        assert script.main([*SMALL, "--repeats", "2", "--out", str(path)]) == 0
    assert "0.910  0.900..0.920" in capsys.readouterr().out
    assert first.read_bytes() == again.read_bytes()


def test_training_stops_when_the_task_is_solved(monkeypatch):
    options = script.command().parse_args(SMALL)
    monkeypatch.setattr(script, "SOLVED", 0.0)
    assert script.train(Rung("full"), 0, options).steps == 1


@pytest.mark.slow
def test_larger_states_recall_more():
    options = script.command().parse_args(
        ["--pairs", "12", "--steps", "150", "--repeats", "1", "--threads", "1", "--test", "64"]
    )
    small, large = (script.train(Rung("linear", d), 0, options).end for d in (2, 16))
    assert large > 0.9
    assert small < large - 0.3
