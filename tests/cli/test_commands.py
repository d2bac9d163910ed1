import json

import pytest
from typer.testing import CliRunner

from foveate.cli import compare as compare_command
from foveate.cli import doctor as doctor_command
from foveate.cli.app import app
from foveate.core.registry import list_systems
from foveate.kernels.cpu.library import absent


def run(*arguments, code=0):
    found = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    return found.output


def test_list_shows_every_system_and_filters():
    output = run("list")
    for facts in list_systems():
        assert facts.key in output
    local = run("list", "--family", "local")
    assert "swin" in local
    assert "biformer" not in local
    assert "swin" not in run("list", "*neighborhood*")
    assert "No system matches" in run("list", "--family", "nonsense", code=1)


def test_list_as_json_has_the_facts():
    records = json.loads(run("list", "--json"))
    assert [r["key"] for r in records] == [facts.key for facts in list_systems()]
    swin = next(r for r in records if r["key"] == "swin")
    assert swin["arxiv"] == "2103.14030"
    assert swin["dims"] == [1, 2, 3]


def test_show_has_paper_equation_facts_and_picture(tmp_path):
    output = run("show", "swin", "--svg", str(tmp_path / "a" / "swin.svg"))
    assert "Hierarchical Vision Transformer" in output
    assert "arxiv.org/abs/2103.14030" in output
    assert "softmax" in output
    assert "fidelity" in output
    assert "█" in output
    svg = (tmp_path / "a" / "swin.svg").read_text()
    assert svg.startswith("<svg")
    assert 'class="cell"' in svg


@pytest.mark.parametrize("facts", list_systems(), ids=lambda facts: facts.key)
def test_show_draws_every_system(facts):
    output = run("show", facts.key)
    # What reads from sources of its own has no grid of tokens to draw.
    assert ("listens to" in output) == (facts.layout != "cross")
    assert facts.layout in output


def test_unknown_names_are_answered_with_the_nearest():
    assert "Did you mean 'swin'" in run("show", "swim", code=2)
    assert "Did you mean 'image'" in run("compare", "--workload", "imag", code=2)


def test_explain_prints_the_plan():
    output = run("explain", "--grid", "64x64", "--window", "13", "--heads", "8", "--head-dim", "64")
    # 8 heads, 64 x 64 queries, 13 x 13 keys each are 5,537,792 pairs, of 8 heads x 4096 x 4096.
    assert "5.54 M (4.13% of dense)" in output
    assert "tiles" in output
    assert "not sdpa" in output
    dense = run("explain", "--grid", "4096", "--causal")
    assert "4096" in dense.replace(",", "")
    assert run("explain", "--window", "13x7", "--dilation", "2x1", "--dtype", "bfloat16", "--kv-heads", "2")


def test_explain_simulate_names_the_strides_worth_choosing():
    output = run("explain", "--grid", "256x256", "--window", "80", "--simulate")
    assert "10.2x is in reach" in output
    lines = [line.split() for line in output.splitlines() if "fully block-sparse" in line and "/" in line]
    assert [(line[0], line[1], line[5]) for line in lines] == [
        ("128/128", "16x16", "10.24x"),
        ("256/128", "16x16", "10.24x"),
    ]
    cosmos = ["--grid", "44x80", "--window", "20x40", "--stride", "4x8", "--tile-q", "4x8", "--tile-k", "4x8"]
    (line,) = [x for x in run("explain", *cosmos, "--simulate").splitlines() if x.startswith("4x8/4x8")]
    assert line.split()[1:6] == ["4x8", "4x8", "4x8", "77.3%", "4.4x"]
    causal = run("explain", "--grid", "512", "--window", "64", "--dilation", "2", "--causal", "--simulate")
    assert "128/128" in causal
    # On the diagonal of a causal axis tiles are always cut.
    assert "block-sparse" not in causal.split("bound:")[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "--simulate"], "Add --window 13"),
        (["explain", "--window", "13", "--tile-q", "8", "--tile-k", "8"], "Add --simulate"),
        (["explain", "--window", "13", "--simulate", "--tile-q", "8"], "both --tile-q and --tile-k"),
        (["explain", "--window", "13", "--simulate", "--tile-q", "8x8x8", "--tile-k", "8"], "query_tile"),
        (["explain", "--window", "13", "--simulate", "--tile-q", "0", "--tile-k", "8"], "positive integers"),
        (["explain", "--window", "99"], "window"),
        (["explain", "--window", "x"], "window: expected an integer such as 13"),
        (["explain", "--dilation", "2"], "Add --window 13"),
        (["explain", "--grid", "ax4"], "grid: expected sizes such as 64x64"),
        (["explain", "--heads", "0"], "heads: expected a positive integer"),
        (["explain", "--backend", "fast"], "fast"),
        (["explain", "--dtype", "int8"], "dtype: expected one of"),
        (["compare", "--budget", "-1"], "budget: expected a positive number"),
        (["compare", "--mechanisms", "swim"], "Did you mean"),
        (["compare", "--data", "/no/such"], "data: expected an existing folder"),
        (["compare", "--resume", "--out", "/no/such/run"], "no run to go on with"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_two(arguments, said):
    output = run(*arguments, code=2)
    assert said in output
    assert "Traceback" not in output


def test_doctor_tells_what_is_here_and_what_is_not(monkeypatch):
    monkeypatch.setattr(
        doctor_command, "extras", lambda: {"compare": {"jinja2": "3"}, "timm": {"timm": None}}
    )
    output = run("doctor")
    for word in ("torch", "threads", "isa", "sdpa", "tiles", "reference", "backends"):
        assert word in output
    assert "pip install 'foveate[timm]'" in output
    assert "foveate[compare]" not in output
    assert ("no  cpu" if absent() else "yes cpu") in output
    assert "no  triton" in output


def test_extras_are_read_from_the_packages_own_metadata():
    found = doctor_command.extras()
    assert set(found) >= {"compare", "timm", "test"}
    assert found["test"]["pytest"] == pytest.__version__
    assert "jinja2" in found["compare"]


def test_a_missing_extra_is_the_exact_pip_line(monkeypatch, tmp_path):
    real = compare_command.find_spec
    monkeypatch.setattr(compare_command, "find_spec", lambda name: None if name == "jinja2" else real(name))
    output = run("compare", "--out", str(tmp_path), code=2)
    assert "Run: pip install 'foveate[compare]'" in output
    assert not list(tmp_path.iterdir())


SMALL = ["--workload", "shapes", "--grid", "16x16", "--heads", "2", "--head-dim", "8", "--budget", "30"]


def test_compare_writes_results_and_report(tmp_path):
    output = run("compare", *SMALL, "--mechanisms", "swin,sigmoid_attention", "--out", str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.html"}
    document = json.loads((tmp_path / "results.json").read_text())
    assert {r["mechanism"] for r in document["rows"]} == {"swin", "sigmoid_attention", "full_attention"}
    assert document["settings"]["shape"] == {"grid": [16, 16], "heads": 2, "head_dim": 8, "batch": 1}
    assert "recommendation" in output
    assert "report.html" in output
    assert run(
        "compare", *SMALL, "--mechanisms", "swin,sigmoid_attention", "--out", str(tmp_path), "--resume"
    )


def test_ctrl_c_leaves_a_report_and_exits_with_130(tmp_path, monkeypatch):
    from foveate.advise import shapes

    real = shapes.time_interleaved
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(shapes, "time_interleaved", interrupted)
    output = run("compare", *SMALL, "--mechanisms", "swin", "--out", str(tmp_path), code=130)
    assert "--resume goes on from it" in output
    assert "partial: interrupted" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"
