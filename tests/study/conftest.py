"""Families that other tests or the documentation's snippets registered do not take part here."""

import pytest

from foveate.study import candidates


@pytest.fixture(autouse=True)
def _own_families(monkeypatch):
    candidates.families()
    own = {n: f for n, f in candidates._FAMILIES.items() if f.members.__module__.startswith("foveate.")}
    monkeypatch.setattr(candidates, "_FAMILIES", own)
