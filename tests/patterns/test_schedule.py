"""Schedules of explicit cells: counts, transposes, combination, validation."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.patterns.basic import Causal
from foveate.patterns.boxes import AxisClass, BoxGroup
from foveate.patterns.grids import Neighborhood
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.lower import lower
from foveate.patterns.schedule import Mean, Schedule, Weights
from foveate.patterns.specials import with_specials


@st.composite
def explicit_groups(draw, n_q=13, n_k=11):
    """Random cells: repeats, absent ids, with and without masks, static or per head."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    b, h = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    cells, tq, tk = draw(st.integers(0, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    q = torch.randint(-1, n_q, (b, h, cells, tq), generator=generator)
    k = torch.randint(-1, n_k, (b, h, cells, tk), generator=generator)
    kind = draw(st.sampled_from(["none", "shared", "own"]))
    if kind == "none":
        return ExplicitGroup(q, k)
    lead = (1, 1, 1) if kind == "shared" else (b, h, cells)
    return ExplicitGroup(q, k, torch.rand(*lead, tq, tk, generator=generator) < 0.6)


def count_pairs(schedule):
    """The plainest possible expansion."""
    b, h = schedule.leading
    out = torch.zeros(b, h, schedule.n_q, schedule.n_k, dtype=torch.int32)
    for group in schedule.groups:
        gb, gh = group.leading
        for i in range(b):
            for j in range(h):
                q = group.q_ids().expand(gb, gh, -1, -1)[i % gb, j % gh]
                k = group.k_ids().expand(gb, gh, -1, -1)[i % gb, j % gh]
                mask = torch.ones(gb, gh, group.n_cells, group.tq, group.tk, dtype=torch.bool)
                if group.allowed is not None:
                    mask = mask & group.allowed
                for c, x, y in mask[i % gb, j % gh].nonzero().tolist():
                    if q[c, x] >= 0 and k[c, y] >= 0:
                        out[i, j, q[c, x], k[c, y]] += 1
    return out


schedules = st.lists(explicit_groups(), max_size=3).map(lambda groups: Schedule(13, 11, groups, "sum"))


@given(schedules)
def test_expand_and_counts(schedule):
    want = count_pairs(schedule)
    schedule.validate()
    assert torch.equal(schedule.expand(), want)
    assert schedule.pairs_needed == int(want.sum())
    assert schedule.n_cells == schedule.full_cells + schedule.partial_cells
    assert schedule.pairs_dense == want.numel()


@given(schedules, st.sampled_from([1, 3, 64]))
def test_transpose(schedule, tile):
    back = schedule.transpose(tile)
    back.validate()
    assert back.is_single_cell
    want = count_pairs(schedule).transpose(2, 3)
    assert torch.equal(back.expand().expand(want.shape), want)
    assert back is schedule.transpose(tile)
    assert max([group.tq for group in back.groups], default=0) <= tile


@given(schedules)
def test_single_cell_and_disjointness_by_counting(schedule):
    b, h = schedule.leading
    stands = torch.zeros(b, h, 14, dtype=torch.int64)
    for group in schedule.groups:
        ids = group.q_ids().expand(b, h, -1, -1).reshape(b, h, -1) + 1
        stands.scatter_add_(2, ids, torch.ones_like(ids))
    assert schedule.is_single_cell == bool((stands[..., 1:] <= 1).all())
    lse = Schedule(13, 11, schedule.groups)
    if int(count_pairs(schedule).max()) > 1:
        with pytest.raises(ArgumentError, match="twice for query"):
            lse.validate()
    else:
        lse.validate()
    assert lse.validate(disjoint=False) is lse


def test_routed_regions_transpose_without_masks():
    """BiFormer-like: each region of queries picks whole regions of keys, per head."""
    regions, size = 9, 4
    picked = torch.stack([torch.randperm(regions)[:3] for _ in range(2 * regions)]).view(1, 2, regions, 3)
    tokens = torch.arange(size)
    q = (torch.arange(regions)[:, None] * size + tokens)[None, None]
    k = (picked[..., None] * size + tokens).flatten(3)
    schedule = Schedule(36, 36, (ExplicitGroup(q, k),)).validate()
    assert schedule.is_single_cell
    assert schedule.leading == (1, 2)
    back = schedule.transpose(size)
    assert all(group.allowed is None for group in back.groups)
    assert torch.equal(back.expand(), schedule.expand().transpose(2, 3))
    assert back.pairs_needed == schedule.pairs_needed == 2 * 36 * 12


def test_key_runs_cover_the_keys():
    ids = torch.tensor([[4, 5, 6, -1, 9, 2, 3], [-1, -1, -1, -1, -1, -1, -1], [0, 2, 4, 6, 8, 7, 8]])
    runs = ExplicitGroup(torch.zeros(1, 1, 3, 1, dtype=torch.int64), ids[None, None]).key_runs()
    assert runs.start[0, 0].tolist() == [[4, 9, 2, 0, 0, 0], [0] * 6, [0, 2, 4, 6, 8, 7]]
    assert runs.length[0, 0].tolist() == [[3, 1, 2, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 2]]
    assert runs.column[0, 0].tolist() == [[0, 4, 5, 0, 0, 0], [0] * 6, [0, 1, 2, 3, 4, 5]]


@given(st.sampled_from(["box", "specials", "explicit"]), st.integers(0, 3), st.integers(1, 4))
def test_key_runs_rebuild_the_ids(kind, lo, count):
    where = Neighborhood((9, 7), (4, 3), (2, 1))
    if kind == "specials":
        where = with_specials(where, 2)
    if kind == "explicit":
        where = ~where
    for group in lower(where, tile=3).groups:
        runs, ids = group.key_runs(lo, lo + count), group.k_ids(lo, lo + count)
        rebuilt = torch.full_like(ids, -1)
        for c, r in (runs.length[0, 0] > 0).nonzero().tolist():
            start, length, column = (int(x[0, 0, c, r]) for x in runs)
            rebuilt[0, 0, c, column : column + length] = torch.arange(start, start + length)
        assert torch.equal(rebuilt, ids)


@given(st.sampled_from([1, 2, 5, 8]), st.booleans(), st.booleans())
def test_ranges_variants_and_packed_masks_agree(tile, uniform, closed):
    where = Neighborhood((9, 7), (4, 3), stride=(2, 1), causal=(True, False))
    where = where if closed else where | Causal()
    for group in lower(where, tile=tile, uniform=uniform).groups:
        mask, variants, index = group.mask(), group.mask_variants(), group.mask_index()
        assert torch.equal(torch.cat([group.q_ids(0, 2), group.q_ids(2)], dim=2), group.q_ids())
        assert torch.equal(torch.cat([group.k_ids(0, 2), group.k_ids(2)], dim=2), group.k_ids())
        if group.is_full:
            assert mask is None
            assert variants is None
            assert index is None
            assert group.packed_mask() is None
            continue
        every = mask.expand(-1, -1, group.n_cells, -1, -1)
        assert torch.equal(variants[:, :, index], every)
        part = group.mask(1, 3).expand(-1, -1, len(index[1:3]), -1, -1)
        assert torch.equal(part, every[:, :, 1:3])
        packed = group.packed_mask()
        assert packed.shape[-1] == -(-group.tk // 8)
        t = torch.arange(group.tk)
        assert torch.equal((packed[..., t // 8] >> (t % 8)) & 1, variants.to(torch.uint8))


def test_static_groups_count_once_per_batch_and_head():
    static = ExplicitGroup(torch.zeros(1, 1, 1, 1).long(), torch.zeros(1, 1, 1, 2).long())
    routed = ExplicitGroup(torch.ones(2, 3, 1, 1).long(), torch.zeros(2, 3, 1, 4).long())
    schedule = Schedule(4, 4, (static, routed), "sum")
    assert schedule.leading == (2, 3)
    assert schedule.pairs_needed == 6 * (2 + 4) == int(schedule.expand().sum())
    assert schedule.n_cells == schedule.full_cells == 12
    assert schedule.pairs_dense == 6 * 16


def group_of(q, k, mask=None):
    return ExplicitGroup(torch.tensor(q)[None, None], torch.tensor(k)[None, None], mask)


def test_validate_names_what_is_wrong():
    good = group_of([[0, 1]], [[0, 1, 2]])
    with pytest.raises(ArgumentError, match=r"groups\[1\]\.k_ids\[0, 0, 0, 1\].*n_k=7.*got 7"):
        Schedule(4, 7, (good, group_of([[2]], [[0, 7]]))).validate()
    with pytest.raises(ArgumentError, match=r"groups\[0\]\.q_ids\[0, 0, 0, 1\].*got 1"):
        Schedule(1, 7, (good,)).validate()
    with pytest.raises(ArgumentError, match=r"q_ids.*-2"):
        Schedule(4, 7, (group_of([[-2]], [[0]]),)).validate()
    with pytest.raises(ArgumentError, match=r"key 2 twice for query 1"):
        Schedule(4, 7, (good, group_of([[1]], [[2, 4]]))).validate()
    with pytest.raises(ArgumentError, match=r"key 3 twice for query 0"):
        Schedule(4, 7, (group_of([[0]], [[3, 3]]),)).validate()
    Schedule(4, 7, (good, group_of([[1]], [[2, 4]])), "sum").validate()
    once = torch.tensor([[[[[True, False]]]]])
    Schedule(4, 7, (group_of([[0]], [[3, 3]], once),)).validate()


def test_wrong_tensors_are_named():
    q, k = torch.zeros(1, 1, 2, 3).long(), torch.zeros(1, 1, 2, 4).long()
    with pytest.raises(ArgumentError, match=r"q_ids.*int64"):
        ExplicitGroup(q.int(), k)
    with pytest.raises(ArgumentError, match=r"k_ids.*4 dimensions"):
        ExplicitGroup(q, k[0])
    with pytest.raises(ArgumentError, match=r"k_ids.*as many cells"):
        ExplicitGroup(q, k[:, :, :1])
    with pytest.raises(ArgumentError, match=r"mask.*bool"):
        ExplicitGroup(q, k, torch.ones(1, 1, 2, 3, 4))
    with pytest.raises(ArgumentError, match=r"mask.*broadcasts"):
        ExplicitGroup(q, k, torch.ones(1, 1, 2, 4, 4).bool())
    with pytest.raises(ArgumentError, match=r"broadcast together"):
        ExplicitGroup(q.expand(2, 1, 2, 3), k.expand(3, 1, 2, 4))
    with pytest.raises(ArgumentError, match=r"groups.*broadcast together"):
        Schedule(4, 4, (ExplicitGroup(q.expand(2, 1, 2, 3), k), ExplicitGroup(q.expand(3, 1, 2, 3), k)))
    with pytest.raises(ArgumentError, match=r"groups\[0\]"):
        Schedule(4, 4, ("cells",))
    with pytest.raises(ArgumentError, match="n_q"):
        Schedule(-1, 4, ())
    with pytest.raises(ArgumentError, match="combine"):
        Schedule(4, 4, (), "max")


def test_validate_checks_boxes():
    tile = AxisClass.full(4, 6)
    Schedule(4, 6, (BoxGroup((tile,), (4,), (6,)),)).validate()
    for group, name in (
        (BoxGroup((tile,), (3,), (6,)), "q_starts"),
        (BoxGroup((tile,), (4,), (5,)), "k_starts"),
        (BoxGroup((tile,), (4,), (6,), q_offset=1), "q_offset"),
        (BoxGroup((tile,), (4,), (6,), k_offset=1), "k_offset"),
        (BoxGroup((AxisClass.full(4, 0),), (4,), (6,), lead=7), "lead"),
    ):
        with pytest.raises(ArgumentError, match=name):
            Schedule(4, 6, (group,)).validate()
    two = (BoxGroup((tile,), (4,), (6,)), BoxGroup((tile,), (4,), (6,)))
    assert not Schedule(4, 6, two).is_single_cell
    with pytest.raises(ArgumentError, match="twice"):
        Schedule(4, 6, two).validate()


def test_weights_need_one_tensor_per_group():
    group = group_of([[0, 1]], [[0]])
    assert Weights(torch.ones(1)).weights[0].shape == (1,)
    Schedule(2, 2, (group,), Weights(torch.ones(3, 2, 1, 2))).validate()
    with pytest.raises(ArgumentError, match="one per group"):
        Schedule(2, 2, (group, group), Weights(torch.ones(1, 1, 1, 2))).validate()
    with pytest.raises(ArgumentError, match=r"combine\.weights\[0\]"):
        Schedule(2, 2, (group,), Weights(torch.ones(1, 1, 2, 2))).validate()


def test_mean_is_a_value():
    assert Mean(1e-5) == Mean(eps=1e-5) != Mean()
    assert eval(repr(Mean(0.5))) == Mean(0.5)


def test_memo_makes_once_in_many_threads():
    schedule, made = lower(Causal(), 9), []
    key = object()

    def make():
        made.append(1)
        return object()

    found = []
    threads = [threading.Thread(target=lambda: found.append(schedule.memo(key, make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(map(id, found))) == 1


def test_copies_and_moves():
    for where in (Neighborhood((5, 6), 3), Neighborhood((5, 6), 3) | Causal()):
        schedule = lower(where)
        for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert torch.equal(other.expand(), schedule.expand())
            assert (other.product is None) == (schedule.product is None)
        assert schedule.to("cpu") is schedule
        moved = schedule.to("meta")
        assert moved is schedule.to("meta")
        assert all(group.q_ids().is_meta and group.k_ids().is_meta for group in moved.groups)
        assert repr(schedule).startswith("Schedule(30 x 30, ")
