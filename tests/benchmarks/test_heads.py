"""The benchmark of heads on a small problem."""

import pytest
import torch

from benchmarks import heads
from foveate.measure.timer import Timing


@pytest.mark.parametrize("more", [[], ["--causal"]])
def test_it_runs_on_a_small_problem(capsys, more):
    threads = torch.get_num_threads()
    small = ["--lengths", "64", "--repeats", "2", "--dim", "32", "--heads", "8", "--threads", str(threads)]
    assert heads.main([*small, *more]) == 0
    printed = capsys.readouterr().out
    assert "| 64 | 25% |" in printed
    assert "| 64 | 90% |" in printed
    assert "WRONG" not in printed


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(heads, "attend_chosen", lambda q, k, v, chosen, **options: torch.ones_like(q))
    assert heads.main(["--lengths", "64"]) == 1
    assert "WRONG, nothing is timed" in capsys.readouterr().out


def test_ratios_and_draws():
    assert heads.ratio(Timing((2.0, 2.0)), Timing((4.0, 4.0))) == "0.50 [0.50..0.50]"
    assert heads.draw(9, 6, 2).sum(-1).eq(2).all()
