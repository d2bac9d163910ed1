"""The core alone against plain loops: every level of this machine, odd sizes, one thread and three."""

import pytest


def test_core_agrees_with_plain_loops(built, drive):
    assert drive(built, 25, 100).startswith("25 cases at levels 0..")


@pytest.mark.slow
def test_core_agrees_with_plain_loops_at_length(built, drive):
    drive(built, 400, 300)


@pytest.mark.slow
def test_amx_tiles_as_arrays(build_core, drive, built):
    """The tile products with arrays for tiles, on CPUs without tiles; they need the rest of AVX-512 BF16."""
    levels = int(drive(built, 1, 20).split("levels 0..")[1].split()[0])
    said = drive(build_core("emulated", "-DFOVEATE_EMULATE_AMX=ON"), 60, 200)
    assert f"levels 0..{4 if levels >= 3 else levels}" in said
