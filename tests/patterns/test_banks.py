"""Key banks as patterns and selections: side by side, whatever they are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid  # noqa: F401 - the repr of a pattern names it
from foveate.patterns.banks import Beside, beside
from foveate.patterns.basic import Causal, Explicit, Full, SlidingWindow
from foveate.patterns.grids import Halo, Neighborhood, Windows
from foveate.patterns.lower import lower
from foveate.patterns.schedule import Mean, Schedule
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials

N = 24
GRID = (4, 6)


def some_where(kind: str, n: int):
    return {
        "none": None,
        "full": Full(),
        "causal": Causal("start"),
        "window": SlidingWindow(2, 1),
        "explicit": Explicit(torch.arange(N * n).reshape(N, n) % 3 == 0),
    }[kind]


def dense(parts):
    masks = [torch.ones(N, n, dtype=torch.bool) if w is None else w.dense(N, n) for w, n in parts]
    return torch.cat(masks, dim=1)


banks = st.lists(
    st.tuples(st.sampled_from(["none", "full", "causal", "window", "explicit"]), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


@given(banks, st.booleans(), st.sampled_from([None, 4, 16]))
def test_masks_stand_side_by_side_however_they_are_lowered(kinds, with_grid, tile):
    parts = [(some_where(kind, n), n) for kind, n in kinds]
    if with_grid:
        parts.append((Neighborhood(GRID, 3), N))
    where = Beside(parts)
    n_k = sum(n for _, n in parts)
    expected = dense(parts)
    assert torch.equal(where.dense(N), expected)
    schedule = lower(where, N, n_k, None if tile is None else tile)
    assert schedule.is_single_cell
    assert torch.equal(schedule.expand()[0, 0], expected.int())
    assert torch.equal(schedule.transpose().expand()[0, 0], expected.int().T)
    assert "Explicit" in repr(where) or eval(repr(where)) == where


@pytest.mark.parametrize(
    "last", [Neighborhood(GRID, 3), Windows(GRID, 2, 1), Causal(), SlidingWindow(3, 3), Full()]
)
def test_keys_that_all_see_stay_in_closed_form(last):
    schedule = lower(Beside([(None, 3), (Full(), 2), (last, N)]), N, N + 5)
    assert schedule.product is not None
    assert schedule.pairs_needed == 5 * N + lower(last, N, N).pairs_needed
    assert schedule.transpose().product is not None


def test_special_tokens_keep_the_closed_form_too():
    where = Beside([(None, 3), (with_specials(Neighborhood(GRID, 3), 2), N + 2)])
    schedule = lower(where, N + 2, N + 5)
    assert schedule.product is not None
    assert torch.equal(schedule.expand()[0, 0], where.dense(N + 2).int())
    assert torch.equal(schedule.transpose().expand()[0, 0], where.dense(N + 2).int().T)
    isolated = Beside([(None, 3), (with_specials(Neighborhood(GRID, 3), 2, "isolated"), N + 2)])
    assert torch.equal(lower(isolated, N + 2, N + 5).expand()[0, 0], isolated.dense(N + 2).int())


def test_a_closed_form_describes_a_million_tokens_without_listing_them():
    where = Beside([(None, 16), (Neighborhood((1024, 1024), 13), 1 << 20)])
    schedule = lower(where, 1 << 20)
    assert schedule.nbytes < 1 << 20
    assert schedule.pairs_needed == (1 << 20) * (169 + 16)


def test_empty_banks_are_left_out():
    assert Beside([(Causal(), 0), (Neighborhood(GRID, 3), N), (None, 0)]).parts == (
        (Neighborhood(GRID, 3), N),
    )
    assert Beside([(None, 0)]).dense(3).shape == (3, 0)


def test_equal_by_value_and_drawable():
    where = Beside([(Full(), 2), (Causal(), 5)])
    assert where == Beside([(None, 2), (Causal(), 5)])
    assert where != Beside([(Causal(), 5), (None, 2)])
    assert where.draw_svg(5).startswith("<svg")


def cells(b=1, h=1, n_k=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.arange(N).view(1, 1, 4, 6).expand(b, h, 4, 6)
    keys = torch.rand(b, h, 4, n_k, generator=generator).argsort(-1)[..., :3]
    return Selection(q, keys, n_q=N, n_k=n_k)


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
def test_selections_keep_their_pairs_beside_anything(lead):
    parts = [(cells(*lead), 8), (None, 2), (Causal("start"), 5), (cells(n_k=9, seed=1), 9)]
    joined = beside(parts)
    masks = [
        w.dense() if isinstance(w, Selection) else Beside([(w, n)]).dense(N)[None, None] for w, n in parts
    ]
    expected = torch.cat([m.expand(*lead, -1, -1) for m in masks], dim=-1)
    assert torch.equal(joined.dense(), expected)
    joined.schedule.validate()
    assert torch.equal(
        beside([(cells().schedule, 8), (cells(), 8)]).dense(), cells().dense().repeat(1, 1, 1, 2)
    )


def test_cells_of_the_same_queries_become_one():
    joined = beside([(cells(), 8), (cells(2, 3, seed=1), 8)])
    assert len(joined.cells) == 1
    assert joined.schedule.is_single_cell
    masked = cells() & Explicit(torch.rand(N, 8) < 0.5)
    joined = beside([(cells(), 8), (masked, 8)])
    assert len(joined.cells) == 1
    assert torch.equal(joined.dense(), torch.cat([cells().dense(), masked.dense()], -1))


def test_what_does_not_fit_is_named():
    with pytest.raises(ArgumentError, match="parts"):
        Beside([])
    with pytest.raises(ArgumentError, match=r"beside\(...\) takes Selections"):
        Beside([(cells(), 8)])  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match="put beside other keys"):
        Beside([(Halo(GRID, 2, 1, "zero"), N), (None, 2)])
    with pytest.raises(ArgumentError, match="n_k"):
        Beside([(None, 3)]).dense(2, 4)
    with pytest.raises(ArgumentError, match="cells for 24 x 8"):
        beside([(cells(), 7)])
    mean = Schedule(N, 8, cells().schedule.groups, Mean())
    with pytest.raises(ArgumentError, match="Mean"):
        beside([(mean, 8), (None, 1)])
    with pytest.raises(ArgumentError, match="Pattern, Selection"):
        beside([(cells(), 8), (3, 1)])
