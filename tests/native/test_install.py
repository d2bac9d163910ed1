"""The four ways an installation can end: with the core, told not to, could not, must not go on without."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.native.conftest import ROOT, need

REASON = "foveate/kernels/cpu/not_built.txt"


def test_the_core_is_here_where_it_is_required():
    from foveate.kernels.cpu.library import absent

    if os.environ.get("FOVEATE_REQUIRE_NATIVE") == "1":
        assert absent() is None


def test_doctor_says_which_core_runs_or_why_none_does():
    from foveate.cli.doctor import backends, core
    from foveate.kernels.cpu.library import absent, isa_levels

    why = absent()
    assert backends()["cpu"] == (why or "")
    assert core().startswith(why or isa_levels()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A function (**environment) -> (wheel or None, what pip printed), from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "libfoveate_cpu.*")
    )
    # What an editable install leaves beside the sources must not get into a wheel.
    (tree / "src/foveate/kernels/cpu/libfoveate_cpu.so").write_text("stale")

    def build(**environment: str):
        out = tmp_path_factory.mktemp("wheels")
        base = {k: v for k, v in os.environ.items() if not k.startswith("FOVEATE_")}
        pins = {"PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt")}
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(out), str(tree)]
        done = subprocess.run(command, capture_output=True, text=True, env={**base, **pins, **environment})
        return next(out.glob("*.whl"), None), done.stdout + done.stderr

    return build


def contents(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_wheel_with_the_core_fits_every_python_of_one_platform(wheel):
    need("c++", "the wheel with the core")
    path, said = wheel(FOVEATE_REQUIRE_NATIVE="1")
    assert path is not None, said
    assert "-py3-none-" in path.name
    assert not path.name.endswith("-any.whl")
    files = contents(path)
    core = [name for name in files if name.startswith("foveate/kernels/cpu/libfoveate_cpu.")]
    assert len(core) == 1
    assert files[core[0]] != b"stale"
    assert REASON not in files
    assert not [name for name in files if "/cpu/core/" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FOVEATE_NO_NATIVE": "1"}, "FOVEATE_NO_NATIVE=1 was set"),
        ({"CXX": "/bin/false"}, "the C++ build failed"),
    ],
)
def test_wheel_without_the_core_is_pure_and_says_why(wheel, environment, reason):
    path, said = wheel(**environment)
    assert path is not None, said
    assert path.name.endswith("-py3-none-any.whl")
    files = contents(path)
    assert reason in files[REASON].decode()
    assert not [name for name in files if "libfoveate_cpu" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [({"CXX": "/bin/false"}, "CMake configuration failed"), ({"FOVEATE_NO_NATIVE": "1"}, "are both set")],
)
def test_a_required_core_is_never_left_out(wheel, environment, message):
    path, said = wheel(FOVEATE_REQUIRE_NATIVE="1", **environment)
    assert path is None, said
    assert message in said
