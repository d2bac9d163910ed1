"""The benchmark scripts work on small problems, and their page keeps what it has."""

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.gpu import check, timing
from foveate.patterns.pattern import Pattern


def test_every_gpu_problem_is_well_formed():
    for where, n, _ in check.cases(quick=False).values():
        if isinstance(where, Pattern):
            assert where.lengths(n) == (n, n)
    for where, n in timing.problems(quick=False).values():
        assert where.lengths(n) == (n, n)


def test_the_gpu_check_runs_and_notices_a_wrong_backend(monkeypatch, capsys):
    case = check.cases(quick=True)["neighborhood"]
    assert check.check("neighborhood", case, "cpu", torch.float32)
    attend = check.attend
    monkeypatch.setattr(
        check,
        "attend",
        lambda *a, backend, **k: attend(*a, backend=backend, **k) * (1 + 1e-4 * (backend == "tiles")),
    )
    assert not check.check("neighborhood", case, "cpu", torch.float32)
    assert "tiles      WRONG" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [check, timing])
def test_without_a_gpu_nothing_is_claimed(script, capsys):
    assert script.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_page_keeps_sections_that_were_not_run(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f'"""About {name}.\n\n    usage\n\nMore.\n"""\nprint("{name} printed")\n'
        )
    (tmp_path / "bad.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    monkeypatch.setattr(benchmarks, "PAGE", tmp_path / "page.md")
    assert benchmarks.main(["one"]) == 0
    first = benchmarks.PAGE.read_text()
    assert "About one." in first
    assert "one printed" in first
    assert "usage" not in first
    assert benchmarks.main(["two", "--note", "Measured here."]) == 0
    both = benchmarks.PAGE.read_text()
    assert set(benchmarks.sections(both)) == {"one", "two"}
    assert benchmarks.sections(both)["one"] == benchmarks.sections(first)["one"]
    assert both.count("Measured here.") == 1
    assert benchmarks.main(["bad", "one"]) == 1
    assert set(benchmarks.sections(benchmarks.PAGE.read_text())) == {"one", "two"}


def test_options_of_a_script_need_its_name(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["--lengths=64"])
    assert "name the one benchmark" in capsys.readouterr().err
