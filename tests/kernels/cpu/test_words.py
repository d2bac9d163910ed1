"""Cells that come with words, against the core's flattening of their masks."""

import pytest
import torch

from foveate.kernels.attend import attend
from foveate.kernels.cpu.flatten import flatten
from foveate.kernels.cpu.words import flatten_words
from foveate.patterns.bits import BitCells, BitGroup
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Schedule
from foveate.patterns.selection import Selection
from foveate.routing.prefix import select_prefix_top
from foveate.scores.bias import KeyBias


def selection(n=150, size=20, group=1, n_q=None):
    return select_prefix_top(torch.randn(2, 2, n), size, n_q=n_q, group=group, tile=32)


def masked(schedule):
    groups = tuple(ExplicitGroup(g.query, g.key, g.allowed) for g in schedule.groups)
    return Schedule(schedule.n_q, schedule.n_k, groups)


@pytest.mark.parametrize("options", [{}, {"group": 3}, {"n_q": 41}, {"size": 200}])
def test_the_same_rows_and_pairs_as_from_masks(options):
    schedule = selection(**options).schedule
    assert all(isinstance(group, BitGroup) for group in schedule.groups)
    flat, facts, single = flatten(schedule)
    assert single
    _, other, also = flatten(masked(schedule))
    assert (facts.lead_b, facts.lead_h, facts.covers, also) == (other.lead_b, other.lead_h, 1, True)
    assert flat.own_ptr[-1] == 4 * schedule.n_q


@pytest.mark.parametrize("options", [{}, {"group": 3}, {"n_q": 41}])
def test_attention_and_gradients_equal_the_reference(options):
    where = selection(**options)
    q, k, v = (torch.randn(2, 2, n, 16, requires_grad=True) for n in (where.n_q, where.n_k, where.n_k))
    found = []
    for backend in ("cpu", "reference"):
        out = attend(q, k, v, where=where, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_cells_of_absent_queries_alone():
    # Tiles of 70 rows are pieces of 64 and 6; the second piece of the last tile has none that exists.
    where = select_prefix_top(torch.randn(1, 2, 90), 70)
    assert (flatten(where.schedule)[0].own_ptr.diff() == 0).any()
    q, k, v = (torch.randn(1, 2, 90, 16, requires_grad=True) for _ in range(3))
    score = KeyBias(torch.randn(1, 2, 90))
    found = []
    for backend in ("cpu", "reference"):
        out = attend(q, k, v, where=where, score=score, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_the_table_of_pairs_is_not_made(monkeypatch):
    monkeypatch.setattr("foveate.patterns.bits.unpack", lambda *_: pytest.fail("a mask was made"))
    flatten(selection().schedule)


def test_absent_queries_before_others_are_left_to_the_core():
    q_ids = torch.tensor([[[[-1, 0, 1]]]])
    words = torch.tensor([[[[0b110, 0b010]]]])
    where = Selection.of_cells([BitCells(q_ids, torch.tensor([[[[1, 0]]]]), words)], 2, 2)
    assert flatten_words(where.schedule.groups, (1, 1), 2) is None
    q, k, v = torch.randn(3, 1, 1, 2, 8)
    expected = attend(q, k, v, where=where, backend="reference")
    torch.testing.assert_close(attend(q, k, v, where=where, backend="cpu"), expected)
