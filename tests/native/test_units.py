"""What the compiled units contain: no instruction too new for a level, nothing the linker could mix up."""

import re
import subprocess
import sys

import pytest

from tests.native.conftest import need

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF objects")


def objects(built) -> dict[str, str]:
    """Level (or "dispatch") -> its object file."""
    found = {}
    for path in built.glob("CMakeFiles/foveate_*.dir/**/*.o"):
        if path.name == "isa.cpp.o":
            found[re.search(r"foveate_(\w+)\.dir", str(path)).group(1)] = str(path)
        elif path.name == "dispatch.cpp.o":
            found["dispatch"] = str(path)
    assert {"portable", "dispatch"} <= set(found)
    return found


def test_portable_code_uses_no_wide_register(built):
    objdump = need("objdump", "the portable machine code")
    files = objects(built)
    seen = {}
    for name, path in files.items():
        listing = subprocess.run([objdump, "-d", path], capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bret", listing)
        seen[name] = set(re.findall(r"%([yz]mm|tmm)\d", listing))
        vex = re.search(r"\tv(add|mul|mov|fmadd)\w+ ", listing)
        if name in ("portable", "dispatch"):
            assert not seen[name], (name, seen[name])
            assert not vex, (name, vex and vex.group())
    if "avx2" in files:  # the check sees wide registers where they are
        assert seen["avx2"] == {"ymm"}
    if "avx512" in files:
        assert "zmm" in seen["avx512"]


def test_tiles_are_multiplied_in_order_and_given_back(built):
    objdump = need("objdump", "the code for tiles")
    files = objects(built)
    if "amx" not in files:
        pytest.skip("the compiler has no AMX")
    listing = subprocess.run([objdump, "-d", files["amx"]], capture_output=True, text=True, check=True).stdout
    # sums in 0..3, rows in 4 and 5, pairs in 6 and 7: AT&T order is pairs, rows, sums
    products = set(re.findall(r"tdpbf16ps %tmm(\d),%tmm(\d),%tmm(\d)", listing))
    assert products == {("6", "4", "0"), ("7", "4", "1"), ("6", "5", "2"), ("7", "5", "3")}
    assert listing.count("ldtilecfg") == listing.count("tilerelease") > 0
    others = [name for name in files if name not in ("amx", "dispatch")]
    for name in others:
        listing = subprocess.run(
            [objdump, "-d", files[name]], capture_output=True, text=True, check=True
        ).stdout
        assert "tmm" not in listing


def test_units_define_nothing_that_the_linker_may_exchange(built):
    """The linker keeps one copy of inline standard-library code, perhaps the one for the newest CPU."""
    nm = need("nm", "the symbols of the units")
    for name, path in objects(built).items():
        if name == "dispatch":  # portable code may use the standard library
            continue
        listing = subprocess.run(
            [nm, "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split()[-2:] for line in listing.splitlines() if line.strip()]
        own = f"{len(name) + 3}fv_{name}"  # as C++ writes fv_<name>:: into symbols
        assert any(own in symbol for _, symbol in symbols)
        foreign = [
            (kind, symbol)
            for kind, symbol in symbols
            if kind in "WVwvuTDBR"
            and not re.match(rf"_Z\w?NK?{own}", symbol)
            and "gxx_personality" not in symbol
        ]
        assert not foreign, (name, foreign)


def test_library_exports_the_header_and_nothing_else(built):
    nm = need("nm", "the symbols of the library")
    command = [nm, "-D", "--defined-only", str(built / "libfoveate_cpu.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {"fv_best_isa", "fv_forward", "fv_backward_query", "fv_backward_key"} <= names
    assert all(name.startswith("fv_") for name in names), names


def test_library_links_neither_python_nor_torch_nor_openmp(built):
    objdump = need("objdump", "the libraries that the core needs")
    command = [objdump, "-p", str(built / "libfoveate_cpu.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", listing)
    assert needed
    assert not [name for name in needed if re.search(r"python|torch|omp|tbb|mkl", name)], needed
