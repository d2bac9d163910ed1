"""The largest entries of rows as a mask, against sorting."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing import largest
from foveate.routing.largest import largest_mask


def is_right(x, count, mask):
    """Exactly `count` real entries where there are as many, none smaller than one left out."""
    real = x > float("-inf")
    assert mask.sum(-1).equal(real.sum(-1).clamp(max=count))
    assert not (mask & ~real).any()
    least = x.masked_fill(~mask, float("inf")).amin(-1)
    assert (x.masked_fill(mask, float("-inf")).amax(-1) <= least).all()


ROWS = {
    "normal": lambda: torch.randn(40, 300),
    "skewed": lambda: torch.randn(40, 300).exp().square(),
    "tiny": lambda: torch.rand(40, 300) * 1e-30,
    "outlier": lambda: torch.randn(40, 300).index_fill(1, torch.tensor([7]), 1e30),
    "equal": lambda: torch.ones(40, 300),
    "few values": lambda: torch.randint(0, 4, (40, 300)).float(),
    "absent": lambda: torch.randn(40, 300).masked_fill(torch.rand(40, 300) < 0.8, float("-inf")),
    "double": lambda: torch.randn(40, 300, dtype=torch.float64) + 1e9,
    "bfloat16": lambda: torch.randn(40, 300).bfloat16(),
    "no rows": lambda: torch.randn(0, 300),
}


@pytest.mark.parametrize("count", [1, 75, 299, 300])
@pytest.mark.parametrize("kind", ROWS)
def test_exactly_the_largest_are_taken(kind, count):
    x = ROWS[kind]()
    is_right(x, count, largest_mask(x, count))


def test_counting_finds_nearly_all_rows_by_itself():
    for count in (16, 256, 700):
        found = ~largest._cuts(torch.randn(200, 1024), count).isnan()
        assert found.float().mean() > 0.95


def test_rows_that_counting_leaves_are_sorted(monkeypatch):
    monkeypatch.setattr(largest, "_PASSES", 1)
    x = torch.randn(30, 200)
    assert largest._cuts(x, 50).isnan().float().mean() > 0.5
    is_right(x, 50, largest_mask(x, 50))


def test_compiled_it_is_one_graph():
    x = torch.randn(6, 20)
    compiled = torch.compile(largest_mask, backend="eager", fullgraph=True)
    assert compiled(x, 7).equal(largest_mask(x, 7))


@pytest.mark.parametrize("count", [0, 5])
def test_a_bad_count_is_named(count):
    with pytest.raises(ArgumentError, match=r"^count:"):
        largest_mask(torch.zeros(2, 4), count)
