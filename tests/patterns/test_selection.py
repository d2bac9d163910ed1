"""Selections: cells to masks, and the algebra with patterns, selections and schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.patterns import Causal, Full, Halo, Segments, Selection, SlidingWindow
from tests.patterns.strategies import patterns


def by_cells(s):
    """The mask, cell by cell and pair by pair; and how often each pair occurs."""
    b, h = s.batch
    count = torch.zeros(b, h, s.n_q, s.n_k, dtype=torch.long)
    for cell in s.cells:
        q, k = cell.q_ids.expand(b, h, -1, -1), cell.k_ids.expand(b, h, -1, -1)
        mask = torch.ones(()).bool() if cell.mask is None else cell.mask
        mask = mask.expand(b, h, q.shape[2], q.shape[3], k.shape[3])
        for at in mask.nonzero().tolist():
            x, y = q[at[0], at[1], at[2], at[3]], k[at[0], at[1], at[2], at[4]]
            if x >= 0 and y >= 0:
                count[at[0], at[1], x, y] += 1
    return count


@st.composite
def selections(draw, n_q=7, n_k=9, once=True):
    """Random cells; with `once`, queries of different cells differ and keys of a cell differ."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lead = [(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))) for _ in range(3)]
    c, tq, tk = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def ids(shape, n, count):
        if once:
            flat = torch.rand(*shape, n, generator=generator).argsort(-1)[..., :count]
            return torch.where(torch.rand(flat.shape, generator=generator) < 0.2, -1, flat)
        return torch.randint(-1, n, (*shape, count), generator=generator)

    q = ids(lead[0], n_q, min(c * tq, n_q) // c * c).unflatten(-1, (c, -1))
    k = ids((*lead[1], c), n_k, tk)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(*lead[2], c, q.shape[-1], tk, generator=generator) < 0.6
    return Selection(q, k, mask, n_q=n_q, n_k=n_k)


@given(selections(once=False))
def test_dense_is_the_union_of_cells(s):
    assert torch.equal(s.dense(), by_cells(s) > 0)
    assert s.dense().shape == (*s.batch, 7, 9)


@given(selections(once=False))
def test_distinct_keeps_each_pair_once(s):
    once = s.distinct()
    assert torch.equal(by_cells(once), (by_cells(s) > 0).long())


@given(selections(once=False), st.integers(1, 4))
def test_tiled_keeps_every_pair(s, tile):
    cut = s.tiled(tile)
    assert torch.equal(by_cells(cut), by_cells(s))
    assert all(cell.q_ids.shape[-1] <= tile for cell in cut.cells)


@given(selections(), st.data())
def test_with_patterns(s, data):
    p = data.draw(patterns(7, 9))
    mine, theirs = s.dense(), p.dense(7, 9)
    for got in (s & p, p & s):
        assert isinstance(got, Selection)
        assert torch.equal(by_cells(got), (mine & theirs).long())
    for got in (s | p, p | s):
        assert isinstance(got, Selection)
        assert torch.equal(by_cells(got), (mine | theirs).long()), "no pair twice"


@given(selections(), selections())
def test_with_selections(a, b):
    x, y = a.dense(), b.dense()
    assert torch.equal(by_cells(a & b), (x & y).long())
    assert torch.equal(by_cells(a | b), (x | y).long())


@given(selections())
def test_complement(s):
    assert torch.equal(by_cells(~s), (~s.dense()).long())
    assert torch.equal((~~s).dense(), s.dense())


@given(selections(), st.data())
def test_with_schedules(s, data):
    other = Selection.of_pattern(data.draw(patterns(7, 9)), 7, 9)
    schedule, theirs = other.schedule, other.dense()
    assert torch.equal((s & schedule).dense(), s.dense() & theirs)
    assert torch.equal((s | schedule).dense(), s.dense() | theirs)
    # Without any cell left there is nothing to tell batch elements apart by.
    met = (schedule & s).dense()
    assert torch.equal(met.expand(s.dense().shape), s.dense() & theirs)
    assert torch.equal((Causal() & schedule).dense(), Causal().dense(7, 9) & theirs)
    assert torch.equal((schedule | Causal()).dense(), Causal().dense(7, 9) | theirs)
    assert torch.equal((schedule & schedule).dense(), theirs)
    assert torch.equal((~schedule).dense(), ~theirs)


@given(selections())
def test_schedule_expands_to_the_mask(s):
    counts = s.schedule.expand()
    assert torch.equal((counts > 0).expand(s.dense().shape), s.dense())
    s.schedule.validate()


@given(st.data())
def test_pattern_as_selection(data):
    n_q, n_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    p = data.draw(patterns(n_q, n_k))
    assert torch.equal(Selection.of_pattern(p, n_q, n_k).dense()[0, 0], p.dense(n_q, n_k))


@given(selections(once=False), selections(once=False))
def test_holds(a, b):
    q, k = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    assert torch.equal(a.holds(q[None, None], k[None, None]), a.dense())
    for cell in b.cells:
        q, k = cell.q_ids[..., None].clamp(min=0), cell.k_ids[..., None, :].clamp(min=0)
        got = a.holds(q, k)
        lead = torch.broadcast_shapes(a.batch, q.shape[:2])
        dense = a.dense().expand(*lead, 7, 9).flatten(2)
        code = (q * 9 + k).expand(*lead, *got.shape[2:]).flatten(2)
        assert torch.equal(got.flatten(2), dense.gather(2, code))


def test_other_combine_rules_filter_but_do_not_unite():
    q, k = torch.arange(4).view(1, 1, 2, 2), torch.arange(4).view(1, 1, 2, 2)
    s = Selection(q, k, n_q=4, n_k=4, combine="sum")
    other = Selection(q, k, n_q=4, n_k=4)
    assert (s & Causal()).combine == "sum"
    assert (s & other).combine == (other & s).combine == "sum"
    for make in (lambda: s | Causal(), lambda: s | other, lambda: other | s, lambda: ~s, lambda: s & s):
        with pytest.raises(ArgumentError, match="combine"):
            make()


def test_segments_unite_with_patterns():
    ids = torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, 0, 0]])
    got = Segments(ids) | SlidingWindow(1)
    assert torch.equal(got.dense(), Segments(ids).dense() | SlidingWindow(1).dense(5))


def test_no_cells_at_all():
    nothing = Selection(torch.zeros(1, 1, 0, 2).long(), torch.zeros(1, 1, 0, 3).long(), n_q=4, n_k=4)
    assert not nothing.dense().any()
    assert (~nothing).dense().all()
    assert torch.equal((nothing | Causal()).dense()[0, 0], Causal().dense(4))
    other = Selection(torch.arange(4).view(1, 1, 1, 4), torch.arange(4).view(1, 1, 1, 4), n_q=4, n_k=4)
    assert not (other & nothing).dense().any()


def test_errors():
    q, k = torch.zeros(1, 1, 2, 3).long(), torch.zeros(1, 1, 2, 4).long()
    for make, message in [
        (lambda: Selection(q[0], k, n_q=4, n_k=4), "q_ids"),
        (lambda: Selection(q, k.int(), n_q=4, n_k=4), "k_ids"),
        (lambda: Selection(q, k[:, :, :1], n_q=4, n_k=4), "k_ids"),
        (lambda: Selection(q.expand(2, -1, -1, -1), k.expand(3, -1, -1, -1), n_q=4, n_k=4), "broadcast"),
        (lambda: Selection(q, k, torch.ones(1, 1, 2, 3, 4), n_q=4, n_k=4), "mask"),
        (lambda: Selection(q, k, torch.ones(1, 1, 2, 4, 4).bool(), n_q=4, n_k=4), "mask"),
        (lambda: Selection(q, k, torch.ones(1, 1, 1, 2, 3, 4).bool(), n_q=4, n_k=4), "mask"),
        (lambda: Selection(q, k, n_q=-4, n_k=4), "n_q"),
        (lambda: Selection(q, k, n_q=4, n_k=4).tiled(0), "tile"),
        (lambda: Selection(q, k, n_q=4, n_k=4) & Selection(q, k, n_q=5, n_k=4), "n_q"),
        (lambda: Selection(q, k, n_q=4, n_k=4) & Halo(5, 2, 1), "n_q"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            make()
    with pytest.raises(UnsupportedError, match="phantom"):
        Selection(q, k, n_q=4, n_k=4) & Halo(4, 2, 1, "zero")
    with pytest.raises(TypeError):
        Selection(q, k, n_q=4, n_k=4) & 3
    assert "2x" not in repr(Full())
    assert "3x4" in repr(Selection(q, k, n_q=4, n_k=4))
