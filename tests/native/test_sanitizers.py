"""The core under sanitizers: addresses, undefined behaviour, data races."""

import subprocess

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    """A function that skips when the compiler has no run-time library for a sanitizer."""

    def check(name: str) -> None:
        at = tmp_path_factory.mktemp("probe")
        (at / "probe.cpp").write_text("int main() {}\n")
        command = ["c++", f"-fsanitize={name}", "probe.cpp", "-o", "probe"]
        if subprocess.run(command, cwd=at, capture_output=True).returncode:
            pytest.skip(f"the C++ compiler cannot link -fsanitize={name}")

    return check


@pytest.mark.parametrize(("name", "cases"), [("address,undefined", 80), ("thread", 30)])
def test_no_sanitizer_complains(name, cases, sanitizer, build_core, drive):
    sanitizer(name)
    build = build_core("sanitized", f"-DFOVEATE_SANITIZE={name}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    said = drive(
        build, cases, 100, env={"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    )
    assert said.startswith(f"{cases} cases")
