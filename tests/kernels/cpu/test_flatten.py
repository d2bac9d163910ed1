"""flatten: the flat arrays say exactly what the schedule says; `check` catches whatever does not fit."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.kernels.cpu.flatten import LANES, Facts, Flat, check, flatten
from foveate.kernels.cpu.tiling import by_key, single
from foveate.patterns.basic import Causal, Explicit, SlidingWindow
from foveate.patterns.grids import Neighborhood
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.lower import lower
from foveate.patterns.schedule import Schedule
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from tests.kernels.cpu.cases import selections
from tests.patterns.strategies import grid_patterns, patterns


def expand(flat, facts, n_own, n_other):
    """Count, pair by pair, what flat cells let through (b, h, n_own, n_other), in plain Python."""
    out = torch.zeros(facts.lead_b * facts.lead_h, n_own, n_other, dtype=torch.int64)
    words = flat.masks.tolist()
    for s in range(len(out)):
        for c in range(int(flat.set_ptr[s]), int(flat.set_ptr[s + 1])):
            own = flat.own[flat.own_ptr[c] : flat.own_ptr[c + 1]].tolist()
            assert len(own) <= LANES
            runs = flat.runs[flat.run_ptr[c] : flat.run_ptr[c + 1]].tolist()
            other = [start + i for start, length in runs for i in range(length)]
            at = int(flat.mask_ptr[c])
            assert at % 8 == 0 or at == -1
            for row, key in enumerate(other):
                for lane, query in enumerate(own):
                    out[s, query, key] += 1 if at < 0 else words[at // 8 + row] >> lane & 1
    return out.view(facts.lead_b, facts.lead_h, n_own, n_other)


def agrees(schedule):
    pairs = single(schedule).expand().long()
    flat, facts, alone = flatten(single(schedule))
    assert alone
    check_flat(flat, facts, pairs)
    check_flat(*by_key(single(schedule)), pairs.mT)


def check_flat(flat, facts, pairs):
    n_own, n_other = pairs.shape[2:]
    check(flat, facts, n_own, n_other, facts.lead_b, facts.lead_h)
    assert torch.equal(expand(flat, facts, n_own, n_other), pairs)
    owned = torch.zeros(facts.lead_b * facts.lead_h, n_own, dtype=torch.int64)
    for s in range(len(owned)):
        lo, hi = flat.own_ptr[flat.set_ptr[s]], flat.own_ptr[flat.set_ptr[s + 1]]
        owned[s] = torch.bincount(flat.own[lo:hi].long(), minlength=n_own)
    assert owned.max() <= 1
    assert facts.covers == bool((owned == 1).all())
    assert facts.cells == int(flat.set_ptr.diff().max())


@given(where=grid_patterns(), data=st.data())
def test_closed_forms(where, data):
    n = where.lengths(None, None)[0]
    sizes = [data.draw(st.integers(1, 6)) for _ in where.axes(n, n)]
    if torch.tensor(sizes).prod() > LANES:
        sizes = [4] * len(sizes)
    agrees(lower(where, n, n, tuple(sizes)))


@given(data=st.data(), n_q=st.integers(1, 40), n_k=st.integers(1, 40))
def test_any_pattern(data, n_q, n_k):
    where = data.draw(patterns(n_q, n_k))
    agrees(lower(Explicit(where.dense(n_q, n_k)) if where.has_phantoms else where, n_q, n_k))


@given(data=st.data(), n_q=st.integers(1, 90), n_k=st.integers(1, 90))
def test_routed_cells(data, n_q, n_k):
    agrees(data.draw(selections(2, 2, n_q, n_k)).schedule)


@pytest.mark.parametrize("specials", [1, 3, 70])
def test_specials(specials):
    where = with_specials(Neighborhood((5, 6), 3), specials)
    agrees(lower(where, 30 + specials, tile=(2, 3)))
    agrees(lower(where, 30 + specials, tile=(5, 6)))


def test_cells_of_more_than_64_queries_are_cut():
    agrees(lower(Causal(), 150, tile=150))
    agrees(lower(Neighborhood((12, 12), 5), 144, tile=12))


def test_groups_of_several_leads_stand_together():
    ids = torch.stack([torch.randperm(24) for _ in range(6)]).view(2, 3, 4, 6)
    groups = (
        ExplicitGroup(ids[:, :, :2], ids[:, :, 1:3]),
        ExplicitGroup(ids[:1, :1, 2:], ids[:, :, :2], torch.rand(2, 1, 2, 6, 6) > 0.5),
    )
    schedule = Schedule(24, 24, groups)
    flat, facts, _ = flatten(schedule)
    assert torch.equal(expand(flat, facts, 24, 24), schedule.expand().long())


def test_rows_of_the_same_cells_are_exchanged_without_masks():
    ids = torch.randperm(192).view(1, 1, 6, 32)
    chosen = torch.rand(6, 6).argsort(1)[:, :3]
    keys = ids[0, 0][chosen].flatten(1)[None, None]
    flat, facts = by_key(Schedule(192, 192, (ExplicitGroup(ids, keys),)))
    assert (flat.mask_ptr == -1).all()
    assert flat.masks.numel() == 0
    left = 6 - len(chosen.unique())
    assert facts.cells == 6 - left + -(-32 * left // LANES)
    assert facts.covers


def test_any_number_of_threads_exchanges_alike():
    ids = torch.stack([torch.randperm(90) for _ in range(8)]).view(2, 4, 9, 10)
    mask = torch.rand(2, 4, 9, 10, 10) > 0.5
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(by_key(Schedule(90, 90, (ExplicitGroup(ids, ids.flip(2), mask),))))
    finally:
        torch.set_num_threads(before)
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_masks_are_shared_and_full_cells_have_none():
    flat, *_ = flatten(lower(Neighborhood((64, 64), 5), 4096, tile=(4, 8)))
    assert flat.masks.numel() < 2000
    flat, *_ = flatten(lower(Causal(), 256, tile=64))
    assert int((flat.mask_ptr < 0).sum()) == 0  # the diagonal is in every cell
    one = torch.rand(1, 1, 1, 8, 8) > 0.5
    ids = torch.arange(64).view(1, 1, 8, 8)
    flat, *_ = flatten(Schedule(64, 64, (ExplicitGroup(ids, ids, one),)))
    assert flat.masks.numel() == 8
    flat, *_ = flatten(Schedule(64, 64, (ExplicitGroup(ids, ids, one | True),)))
    assert (flat.mask_ptr == -1).all()


def test_rows_owned_twice_are_noticed():
    ids = torch.arange(20).view(1, 1, 2, 10)
    assert flatten(Selection(ids, ids, n_q=20, n_k=20).schedule)[2]
    assert not flatten(Selection(ids // 2, ids, n_q=20, n_k=20).schedule)[2]
    mixed = Schedule(20, 20, (*lower(SlidingWindow(3), 20, tile=5).groups, ExplicitGroup(ids, ids)))
    assert not flatten(mixed)[2]


def test_a_million_tokens_flatten_quickly():
    where = Neighborhood((1024, 1024), 13)
    schedule = lower(where, 1 << 20, tile=(4, 8))
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        flatten(schedule)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0


def good():
    flat, facts, _ = flatten(lower(Explicit(torch.rand(40, 50) > 0.5), 40, 50, tile=16))
    return flat, facts


BROKEN = {
    "own": lambda f: f._replace(own=f.own.clone().fill_(40)),
    "own_ptr": lambda f: f._replace(own_ptr=f.own_ptr.flip(0)),
    "set_ptr": lambda f: f._replace(set_ptr=f.set_ptr + 1),
    "run_ptr": lambda f: f._replace(run_ptr=f.run_ptr[:-1]),
    "runs": lambda f: f._replace(runs=f.runs + torch.tensor([0, 50], dtype=torch.int32)),
    "masks": lambda f: f._replace(masks=f.masks[:-1]),
    "mask_ptr": lambda f: f._replace(mask_ptr=f.mask_ptr.int()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_that_do_not_fit_are_refused(name):
    flat, facts = good()
    check(flat, facts, 40, 50, 2, 3)
    with pytest.raises(ArgumentError, match=f"cells.{name}"):
        check(BROKEN[name](flat), facts, 40, 50, 2, 3)


def test_negative_runs_are_refused():
    flat, facts = good()
    runs = flat.runs.clone()
    runs[0] = torch.tensor([5, -1])
    with pytest.raises(ArgumentError, match=r"cells\.runs"):
        check(flat._replace(runs=runs), facts, 40, 50, 1, 1)


def test_leads_that_do_not_fit_are_refused():
    flat, facts = good()
    with pytest.raises(ArgumentError, match="batches and heads"):
        check(flat, facts._replace(lead_h=2), 40, 50, 1, 3)
    assert isinstance(flat, Flat)
    assert isinstance(facts, Facts)
