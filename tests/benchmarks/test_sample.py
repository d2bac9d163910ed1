"""The comparison of `sample` with grid_sample runs on small problems, and is silent when results are wrong."""

import pytest

from benchmarks import sample as script


@pytest.mark.parametrize("name", sorted(script.WORKLOADS))
def test_every_workload_runs(name, capsys):
    assert script.main(["--only", name, "--scale", "0.002", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "forward+backward" in printed
    assert "peak memory" in printed


def test_nothing_is_timed_when_results_are_wrong(monkeypatch, capsys):
    right = script.sample
    monkeypatch.setattr(script, "sample", lambda *a, **k: right(*a, **k) * 1.001)
    assert script.main(["--only", "video", "--scale", "0.01", "--repeats", "1"]) == 1
    assert "peak memory" not in capsys.readouterr().out
