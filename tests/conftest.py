"""Shared test set-up: hypothesis profiles, deterministic seeds, poisoned memory."""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

# Here and not in tests/parity: where several processes share the tests, the one that reports collects none.
from tests.parity.summary import pytest_terminal_summary  # noqa: F401

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
settings.register_profile("fast", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("all", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("FOVEATE_HYPOTHESIS", "fast"))


def pytest_collection_modifyitems(config, items):
    """`slow` tests run only in `make test-all`, which sets FOVEATE_ALL=1; elsewhere they are deselected."""
    if os.environ.get("FOVEATE_ALL") == "1" or "slow" in (config.option.markexpr or ""):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialised memory with NaN (largest value for integers), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
