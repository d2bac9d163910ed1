"""Builds of the C++ core for the tests of this directory, from the CMakeLists.txt that makes the wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str | None:
    """Where a program is: beside this Python (cmake and ninja come with the `test` extra) or on the PATH."""
    beside = Path(sys.executable).parent
    return shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def need(name: str, what: str) -> str:
    """Return the program, or skip; where the core is required, a missing program is a failure."""
    found = tool(name)
    if found is None:
        said = f"no {name}: {what} is not checked"
        if os.environ.get("FOVEATE_REQUIRE_NATIVE") == "1" and name in ("cmake", "ninja", "c++"):
            pytest.fail(said)
        pytest.skip(said)
    return found


@pytest.fixture(scope="session")
def build_core(tmp_path_factory):
    """A function (name, *CMake options) -> build directory with the library and the driver."""

    def build(name: str, *options: str) -> Path:
        cmake, ninja = need("cmake", "the core"), need("ninja", "the core")
        at = tmp_path_factory.mktemp(name)
        common = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DFOVEATE_DRIVER=ON"]
        for command in ([cmake, "-S", ROOT, "-B", at, *common, *options], [cmake, "--build", at]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
        return at

    return build


@pytest.fixture(scope="session")
def built(build_core) -> Path:
    """The core and the driver with the flags of the wheel."""
    need("c++", "the core")
    return build_core("release")


@pytest.fixture(scope="session")
def drive():
    """A function (build directory, cases, largest, *wrapper) that runs the driver and returns its output."""

    def run(build: Path, cases: int, largest: int, *wrapper: str, env: dict[str, str] | None = None) -> str:
        command = [*wrapper, str(build / "foveate_driver"), str(cases), "0", str(largest)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout

    return run
