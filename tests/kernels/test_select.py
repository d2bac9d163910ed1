"""plan(): the choice, its reasons, and its counts against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import UnknownNameError, UnsupportedError
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.kernels.problem import Problem
from foveate.kernels.select import BACKENDS, plan, watch_plans
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.grids import Neighborhood
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.scores.rules import ReLU, Sigmoid
from foveate.scores.temperature import SoftCap


def shapes(n, *, b=1, h=8, d=64, n_k=None):
    return (b, h, n, d), (b, h, n_k or n, d), (b, h, n_k or n, d)


def choose(n, backend="auto", *, b=1, h=8, d=64, **options):
    return plan(Problem.of(*shapes(n, b=b, h=h, d=d), **options), backend)


# Which backend runs sparse problems: the C++ core where it was built, tiles elsewhere.
SPARSE = "tiles" if absent() else "cpu"


def test_sparse_goes_to_cells_and_dense_to_sdpa():
    assert choose(4096, where=Neighborhood((64, 64), 13)).backend == SPARSE
    assert choose(65536, where=SlidingWindow(255)).backend == SPARSE
    assert choose(4096).backend == "sdpa"
    # Written as a pattern, the core is a candidate too: its products are as fast as those of SDPA.
    assert choose(4096, where=Full()).backend in ("sdpa", SPARSE)
    assert choose(4096, where=Causal()).backend in ("sdpa", SPARSE)
    assert choose(16, where=SlidingWindow(2)).backend != "tiles"


def test_what_only_the_reference_can_do():
    chosen = choose(64, weigh=ReLU())
    assert chosen.backend == "reference"
    assert "softmax only" in chosen.reasons["sdpa"]
    assert "every pair is needed" in chosen.reasons["tiles"]


@pytest.mark.parametrize(
    "options", [{}, {"where": Causal()}, {"weigh": Sigmoid()}, {"score": SoftCap(2.0)}], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_backend_is_chosen_or_has_a_reason(options, backend):
    chosen = choose(64, backend, **options)
    assert set(chosen.reasons) | {chosen.backend} == set(BACKENDS)
    assert chosen.backend not in chosen.reasons
    for reason in chosen.reasons.values():
        assert reason[0].isupper()
        assert reason.endswith(".")
        assert "\n" not in reason


def test_errors():
    with pytest.raises(UnknownNameError, match="'tiles'"):
        choose(64, "tile")
    with pytest.raises(UnsupportedError, match="'tiles' cannot serve this call: There is no `where`"):
        choose(64, "tiles")
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(UnknownNameError, match="'sdpa'"):
        attend(q, q, q, backend="spda")


@given(
    window=st.integers(1, 6),
    sizes=st.tuples(st.integers(6, 14), st.integers(6, 14)),
    specials=st.integers(0, 3),
    b=st.integers(1, 3),
    h=st.integers(1, 3),
)
def test_counts_are_brute_force(window, sizes, specials, b, h):
    inner = Neighborhood(sizes, window)
    where = with_specials(inner, specials) if specials else inner
    n = sizes[0] * sizes[1] + specials
    for backend in ("tiles", "sdpa"):
        chosen = choose(n, backend, b=b, h=h, where=where)
        assert chosen.pairs_needed == int(where.dense(n).sum()) * b * h
        assert chosen.pairs_dense == n * n * b * h
        cells = chosen.schedule.groups
        assert chosen.full_tiles + chosen.partial_tiles == sum(g.n_cells for g in cells) * b * h
        full = sum(
            g.n_cells if g.mask() is None else int(g.mask().all((-1, -2)).expand(1, 1, g.n_cells).sum())
            for g in cells
        )
        assert chosen.full_tiles == full * b * h
        computed = sum(g.n_cells * g.tq * g.tk for g in cells) if backend == "tiles" else n * n
        assert chosen.pairs_computed == computed * b * h
        assert chosen.pairs_needed <= chosen.pairs_computed <= chosen.pairs_dense or backend == "tiles"
        assert chosen.speedup_bound == pytest.approx(n * n / computed)
        assert chosen.flops == 2 * computed * b * h * 128


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 8), (2, 8)])
def test_counts_of_routed_cells(lead):
    ids = torch.stack([torch.randperm(32)[:24] for _ in range(lead[0] * lead[1])]).view(*lead, 3, 8)
    where = Selection(ids, ids, n_q=32, n_k=32)
    chosen = choose(32, "tiles", b=2, where=where)
    assert chosen.pairs_needed == int(where.dense().expand(2, 8, -1, -1).sum()) == chosen.pairs_computed
    assert chosen.full_tiles == 2 * 8 * 3
    assert chosen.partial_tiles == 0
    assert chosen.tile is None


def test_the_bounds_of_exact_key_boxes():
    def bound(tile, where, n):
        return plan(Problem.of(*shapes(n), where=where), "tiles", tile=tile).speedup_bound

    where = Neighborhood((64, 64), 13)
    assert [round(bound(t, where, 4096), 1) for t in ((8, 8), (4, 8), (4, 4))] == [12.0, 14.4, 17.3]
    where = Neighborhood((128, 128), 7, dilation=2)
    assert round(bound((8, 8), where, 16384)) == 93


def test_forward_and_backward():
    chosen = choose(4096, "tiles", where=Neighborhood((64, 64), 13))
    assert chosen.flops_backward == 5 * chosen.flops // 2
    assert chosen.speedup_bound_backward == chosen.speedup_bound
    assert choose(64, "reference").flops_backward == 2 * choose(64, "reference").flops
    if absent() is None:  # logits and d weights once more for the keys
        chosen = choose(4096, "cpu", where=Neighborhood((64, 64), 13))
        assert chosen.flops_backward == 7 * chosen.flops // 2
        assert chosen.speedup_bound_backward == chosen.speedup_bound * 7 / 9


def test_a_named_tile_is_obeyed():
    chosen = plan(Problem.of(*shapes(144), where=Neighborhood((12, 12), 3)), "tiles", tile=(3, 4))
    assert {(g.axes[0].q_count, g.axes[1].q_count) for g in chosen.schedule.groups} == {(3, 4)}
    assert chosen.cell_tile == (3, 4)


def test_empty_problems_have_a_plan():
    chosen = choose(0, where=SlidingWindow(2))
    assert chosen.pairs_needed == chosen.pairs_computed == 0
    assert chosen.speedup_bound == float("inf")


def test_plans_that_run_are_seen_by_those_who_watch():
    q = torch.randn(1, 1, 8, 8)
    with watch_plans() as outer:
        attend(q, q, q)
        with watch_plans() as inner:
            attend(q, q, q, backend="reference")
        choose(8)  # planned, not run
    attend(q, q, q)
    assert [p.backend for p in outer] == ["sdpa", "reference"]
    assert [p.backend for p in inner] == ["reference"]
