"""The core for another architecture: cross-compiled, and run in an emulator where there is one."""

import pytest

from tests.native.conftest import need, tool

pytestmark = pytest.mark.slow


def test_core_agrees_with_plain_loops_on_aarch64(build_core, drive):
    compiler = need("aarch64-linux-gnu-g++", "aarch64")
    build = build_core(
        "aarch64",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    emulator = tool("qemu-aarch64") or tool("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("built for aarch64, not run: no qemu-aarch64")
    assert "levels 0..0" in drive(build, 40, 80, emulator, "-L", "/usr/aarch64-linux-gnu")
