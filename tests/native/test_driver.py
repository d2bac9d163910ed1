"""The core alone against plain loops: every level of this machine, odd sizes, one thread and three."""

import pytest


def test_core_agrees_with_plain_loops(built, drive):
    assert drive(built, 25, 100).startswith("25 cases at levels 0..")


@pytest.mark.slow
def test_core_agrees_with_plain_loops_at_length(built, drive):
    drive(built, 400, 300)
