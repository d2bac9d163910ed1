"""Families of candidates: registered in one place, sized to budgets, extensible."""

from itertools import pairwise

import pytest
import torch

from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.core.grid import Grid
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.patterns.lower import lower
from foveate.study.candidates import Candidate, Setting, candidates, families, family
from foveate.study.mass import rows_of


def maps(n, heads=2, batch=1):
    return tuple(torch.randn(batch, heads, n, 16) for _ in range(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [Grid(96), Grid(12, 8), Grid(4, 4, 6)], ids=str)
def test_every_candidate_chooses_each_pair_once_and_none_that_is_later(grid, causal):
    n = grid.numel
    q, k = maps(n, batch=2)
    found, refused = candidates(Setting(n=n, grid=grid, causal=causal, budgets=(0.1, 0.3)))
    assert {c.kind for c in found} == {"static", "content"}
    assert not set(refused) & {c.family for c in found}
    for candidate in found:
        where = candidate.where(q, k, causal=causal)
        mask = rows_of(where, torch.arange(n), n)  # raises where a pair stands twice
        assert mask.any(), candidate.label
        if causal:
            assert not (mask & ~Causal().dense(n)).any(), candidate.label
        assert lower(where, n, n).pairs_computed >= mask.sum() * (1 if mask.shape[0] == 1 else 0)


@pytest.mark.parametrize("grid", [Grid(256), Grid(16, 16)], ids=str)
def test_candidates_spend_about_their_budget(grid):
    q, k = maps(256)
    budgets = (0.1, 0.4)
    found, _ = candidates(Setting(n=256, grid=grid, budgets=budgets))
    for name in {c.family for c in found} - {
        "axial",
        "dilated window",
    }:  # of one size, and of a quarter at most
        members = [c for c in found if c.family == name]
        assert len(members) == 2, name
        for budget, member in zip(budgets, members, strict=True):
            spent = rows_of(member.where(q, k, causal=False), torch.arange(256), 256).float().mean()
            assert 0.4 * budget < spent < 1.4 * budget, member.label


def test_the_causal_search_spends_about_its_budget():
    q, k = maps(512)
    setting = Setting(n=512, grid=Grid(512), causal=True, budgets=(0.05, 0.2))
    found, _ = candidates(setting, ["tree search"])
    for budget, member in zip(setting.budgets, found, strict=True):
        late = rows_of(member.where(q, k, causal=True), torch.arange(256, 512), 512).float().mean()
        assert 0.5 * budget < late < 1.2 * budget, member.label


def test_stripes_grow_with_theta():
    q, k = maps(256)
    found, _ = candidates(Setting(n=256, grid=Grid(256), causal=True), ["stripes"])
    masks = [rows_of(c.where(q, k, causal=True), torch.arange(256), 256) for c in found]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
    assert masks[0].sum() < masks[-1].sum()


def test_grids_bring_further_families_and_their_absence_is_explained():
    _, refused = candidates(Setting(n=64, grid=Grid(64)))
    assert "neighborhood" in refused
    assert "Name one" in refused["neighborhood"]
    found, refused = candidates(Setting(n=64, grid=Grid(8, 8)))
    assert set(refused) == {"tree search", "stripes", "spans"}
    found_causal, refused = candidates(Setting(n=64, grid=Grid(8, 8), causal=True))
    assert set(refused) == {"regions"}
    assert {"tree search", "stripes", "spans"} <= {c.family for c in found_causal}
    assert {"neighborhood", "axial", "near and far"} <= {c.family for c in found}


def test_families_of_ones_own():
    @family("diagonal", kind="static")
    def diagonal(setting):
        for share in setting.budgets:
            yield "diagonal", lambda q, k: SlidingWindow(0)
            assert share

    found, _ = candidates(Setting(n=32, grid=Grid(32)), only=["diag*"])
    assert [c.label for c in found] == ["diagonal"]
    with pytest.raises(ArgumentError, match="kind"):
        family("x", kind="other")


def test_unknown_families_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'window'"):
        families(["windw"])


def test_a_router_must_return_who_attends():
    q, k = maps(32)
    with pytest.raises(ArgumentError, match="mine: expected a function that returns a Pattern"):
        Candidate("mine", "mine", "content", lambda q, k: q).where(q, k, causal=False)


@pytest.mark.parametrize("budgets", [(), (0.0,), (1.5,)])
def test_budgets_are_shares(budgets):
    with pytest.raises(ArgumentError, match="budgets"):
        Setting(n=8, grid=Grid(8), budgets=budgets)


def test_content_finds_what_is_planted():
    """Queries that match one far block exactly: the content routers take it, a window cannot."""
    n, width = 256, 16
    codes = torch.randn(16, width) * 4
    k = codes.repeat_interleave(16, 0)[None, None] + 0.1 * torch.randn(1, 1, n, width)
    q = codes.roll(5, 0).repeat_interleave(16, 0)[None, None] + 0.1 * torch.randn(1, 1, n, width)
    p = (q @ k.transpose(-1, -2) * width**-0.5).softmax(-1)
    found, _ = candidates(Setting(n=n, grid=Grid(n), budgets=(0.15,)))
    by_family = {}
    for candidate in found:
        mask = rows_of(candidate.where(q, k, causal=False), torch.arange(n), n)
        mass = by_family[candidate.family] = float((p * mask).sum(-1).mean())
        if candidate.kind == "content":
            assert mass > 0.8, candidate.label
        if candidate.family == "window":
            assert mass < 0.3
    assert by_family["blocks by largest weight"] >= by_family["blocks by mean"] - 1e-3


def test_causal_routers_find_what_is_planted_in_the_past():
    n, width = 256, 16
    codes = torch.randn(16, width) * 4
    k = codes.repeat_interleave(16, 0)[None, None] + 0.1 * torch.randn(1, 1, n, width)
    q = codes.roll(6, 0).repeat_interleave(16, 0)[None, None] + 0.1 * torch.randn(1, 1, n, width)
    logits = (q @ k.transpose(-1, -2) * width**-0.5).masked_fill(~Causal().dense(n), float("-inf"))
    found, _ = candidates(Setting(n=n, grid=Grid(n), causal=True, budgets=(0.2,)))
    late = torch.arange(128, n)
    best = {}
    for candidate in found:
        mask = rows_of(candidate.where(q, k, causal=True), late, n)
        mass = float((logits.softmax(-1)[:, :, late] * mask).sum(-1).mean())
        best[candidate.family] = max(mass, best.get(candidate.family, 0.0))
    assert best["window"] < 0.3
    for name in ("tree search", "stripes", "blocks by mean", "blocks by sample", "clusters"):
        assert best[name] > 0.8, name
    # Its anchors may miss blocks as short as these.
    assert best["spans"] > best["window"] + 0.1
