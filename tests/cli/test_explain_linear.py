"""`foveate explain --mechanism` and `foveate show` for systems that scan."""

import pytest
from typer.testing import CliRunner

from foveate.cli.app import app


def run(*arguments, code=0):
    found = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    return found.output


def test_explain_tells_state_operations_and_crossover():
    output = run("explain", "--mechanism", "lightning_attention", "--grid", "4096", "--dtype", "bfloat16")
    # 8 heads of 64 x 64 entries in float32; keys and values of 4096 tokens and 512 channels in bfloat16.
    assert "131 kB a sample" in output
    assert "8.39 MB, more from 65 tokens on" in output
    assert "from 384 tokens on" in output
    assert "2.49 MFLOP a token" in output


def test_show_tells_it_for_what_scans_only():
    assert "crossover" in run("show", "transnormer_llm")
    assert "crossover" not in run("show", "swin")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mechanism", "swin"], "a system that scans"),
        (["--mechanism", "lightning"], "lightning_attention"),
        (
            ["--mechanism", "lightning_attention", "--window", "13"],
            "window: expected nothing beside --mechanism",
        ),
        (["--mechanism", "lightning_attention", "--causal"], "causal: expected nothing beside --mechanism"),
        (["--mechanism", "lightning_attention", "--simulate"], "simulate: expected nothing"),
    ],
)
def test_what_cannot_be_said_is_named(arguments, said):
    assert said in run("explain", *arguments, code=2)
