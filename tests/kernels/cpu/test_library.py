"""The core is there, or says why it is not; both sides agree on its structs."""

import ctypes
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from foveate.core.errors import UnknownNameError, UnsupportedError
from foveate.kernels.cpu import library
from foveate.kernels.cpu.library import ISA_NAMES, Job, absent, forced_isa, isa, isa_levels
from foveate.kernels.cpu.scan import ScanArg

HEADER = Path(__file__).parents[3] / "src/foveate/kernels/cpu/core/foveate_cpu.h"
present = pytest.mark.skipif(
    absent() is not None, reason=f"see test_the_core_is_there_or_says_why: {absent()}"
)


def test_the_core_is_there_or_says_why():
    reason = absent()
    if reason is not None:
        assert reason.strip()
        assert os.environ.get("FOVEATE_REQUIRE_NATIVE") != "1", reason


def run_fresh(code, **env):
    """Run code in an interpreter of its own, with warnings on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_without_the_core_tiles_takes_over_and_says_so_once():
    done = run_fresh(
        """
        import torch
        from foveate import Neighborhood, attend, explain
        x = torch.randn(1, 8, 4096, 16)
        for _ in range(3):
            attend(x, x, x, where=Neighborhood((64, 64), 7))
        text = str(explain(x, x, x, where=Neighborhood((64, 64), 7)))
        assert "not cpu  The C++ core is switched off by FOVEATE_NO_NATIVE=1." in text, text
        """,
        FOVEATE_NO_NATIVE="1",
    )
    assert done.stderr.count("without its fast core") == 1
    assert "FOVEATE_NO_NATIVE" in done.stderr


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    broken = tmp_path / library.library_path().name
    monkeypatch.setattr(library, "library_path", lambda: broken)
    monkeypatch.setattr(sys.modules["foveate.kernels.cpu"], "__path__", [str(tmp_path)])
    assert "was not built" in library._load.__wrapped__()
    (tmp_path / library.REASON_FILE).write_text("no compiler was found\n")
    assert library._load.__wrapped__() == "the C++ core was not built (no compiler was found)"
    (tmp_path / library.REASON_FILE).unlink()
    broken.write_text("no library")
    assert "could not be loaded" in library._load.__wrapped__()


@present
def test_another_version_of_the_core_is_refused(monkeypatch):
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert "another version" in library._load.__wrapped__()


def c_fields(struct):
    """Return the fields of a struct of the header, in order."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    body = next(b for b, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.S) if name == struct)
    found = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        *kind, _ = re.match(r"(const\s+)?(\w+)\s*(\*?)", line).groups(), None
        names = re.sub(r"^(const\s+)?\w+\s*", "", line)
        for name in names.split(","):
            pointer = "*" in name
            found.append((re.sub(r"[*\s]|\[.*", "", name), pointer, kind[0][1]))
    return found


SIMPLE = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@pytest.mark.parametrize(
    ("struct", "ours"),
    [
        ("fv_tensor", library.TensorArg),
        ("fv_cells", library.CellsArg),
        ("fv_ids", library.IdsArg),
        ("fv_term", library.TermArg),
        ("fv_job", Job),
        ("fv_scan", ScanArg),
    ],
)
def test_the_structs_repeat_the_header(struct, ours):
    theirs = c_fields(struct)
    assert [name for name, _, _ in theirs] == [field[0] for field in ours._fields_]
    for (name, pointer, kind), (_, mine) in zip(theirs, ours._fields_, strict=True):
        if pointer or kind == "fv_parallel":
            assert mine is ctypes.c_void_p, name
        elif kind in SIMPLE:
            assert getattr(mine, "_type_", mine) is SIMPLE[kind] or mine is SIMPLE[kind], name


def test_the_constants_repeat_the_header():
    text = HEADER.read_text()
    values = {name: int(value) for name, value in re.findall(r"(FV_\w+) = (\d+)", text)}
    assert values["FV_ABI"] == library.ABI
    assert values["FV_MAX_TERMS"] == library.MAX_TERMS
    assert (values["FV_F32"], values["FV_BF16"], values["FV_F16"]) == (library.F32, library.BF16, library.F16)
    assert (values["FV_SOFTMAX"], values["FV_SIGMOID"]) == (library.SOFTMAX, library.SIGMOID)
    levels = [
        values[name] for name in ("FV_PORTABLE", "FV_AVX2", "FV_AVX512", "FV_AVX512_BF16", "FV_AMX_BF16")
    ]
    assert levels == list(range(len(ISA_NAMES)))


@present
def test_levels():
    assert isa_levels()[0] == "portable"
    assert ISA_NAMES[isa()] == isa_levels()[-1]
    with forced_isa("portable"):
        assert isa() == 0
        with forced_isa(isa_levels()[-1]):
            assert ISA_NAMES[isa()] == isa_levels()[-1]
        assert isa() == 0
    with pytest.raises(UnknownNameError, match="AVX9"), forced_isa("AVX9"):
        pass


@present
def test_a_job_the_core_refuses():
    with pytest.raises(UnsupportedError, match="does not have"):
        library.library().launch(library.FORWARD, Job(isa=99))
