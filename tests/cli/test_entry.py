"""The command as a user starts it: another process, a real signal."""

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "foveate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_module_and_console_script_are_the_same():
    (script,) = entry_points(group="console_scripts", name="foveate")
    from foveate.cli.app import main

    assert script.load() is main
    process = start("--help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for command in ("compare", "list", "show", "explain", "doctor"):
        assert command in out


def test_explain_simulate_in_a_process_of_its_own():
    process = start("explain", "--grid", "32768", "--window", "2048", "--simulate")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    perfect = [
        line.split()[:2] for line in out.splitlines() if "fully block-sparse" in line and "16x" in line
    ]
    assert perfect == [["128/128", "256"], ["256/128", "256"]]


def test_bad_input_ends_with_a_sentence_and_no_traceback():
    process = start("show", "swim")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.strip() == "foveate: system 'swim' is not known. Did you mean 'swin'?"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_a_real_ctrl_c_leaves_valid_files(tmp_path):
    arguments = ["compare", "--workload", "shapes", "--mechanisms", "swin", "--threads", "1"]
    process = start(
        *arguments,
        "--grid",
        "48x48",
        "--heads",
        "2",
        "--head-dim",
        "16",
        "--budget",
        "300",
        "--out",
        str(tmp_path),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        file = tmp_path / "results.json"
        if file.exists() and json.loads(file.read_text())["rows"]:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    document = json.loads((tmp_path / "results.json").read_text())
    if document["status"] == "complete":
        pytest.skip("the machine finished before the signal came")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert document["status"] == "interrupted"
    assert document["rows"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "report.html" in out
