import pytest

from foveate.core import registry
from tests.advise.tiny import TOYS


@pytest.fixture
def toys(monkeypatch):
    """Register the toy mechanisms for one test."""
    registry.list_systems()
    for key, facts in TOYS.items():
        monkeypatch.setitem(registry._SYSTEMS, key, facts)
    return sorted(TOYS)
