import pytest
import torch

from foveate.core.grid import Grid
from foveate.patterns.basic import Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from foveate.patterns.intern import describe, interned, padded, restore
from foveate.patterns.specials import with_specials

PATTERNS = [
    Full(),
    Causal("start"),
    SlidingWindow(3, 1),
    Sinks(2),
    Neighborhood(Grid(6, 8), (3, 5), dilation=(2, 1), stride=(1, 2), causal=(True, False)),
    Windows(Grid(4, 6), (2, 3), shift=1),
    Halo(Grid(4, 4), 2, 1, border="zero"),
    Halo(Grid(4, 4), 2, 1, border="zero").padded().pattern,
    Lattice(Grid(4, 4), 2),
    with_specials(Neighborhood(Grid(3, 4), 3), 2, rule=Causal()),
    (SlidingWindow(2) | Sinks(1)) & ~Causal("start"),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_what_was_described_is_restored(pattern):
    assert restore(describe(pattern)) == pattern
    assert hash(describe(pattern)) == hash(describe(restore(describe(pattern))))


def test_patterns_that_hold_tensors_are_not_described():
    mask = Explicit(torch.eye(3, dtype=torch.bool))
    assert describe(mask) is None
    assert describe(mask & Causal()) is None


def test_nothing_changes_outside_of_compilation():
    for pattern in PATTERNS:
        assert interned(pattern) is pattern
    assert interned(None) is None
    assert padded(Causal()) is None
    halo = Halo(Grid(4, 4), 2, 1, border="zero")
    assert padded(halo) == halo.padded()
