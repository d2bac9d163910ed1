"""Kept queries: the pairs of those that were chosen, and no others, whatever the pattern."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.select import watch_plans
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Halo
from foveate.patterns.selection import Selection
from foveate.routing import queries
from foveate.routing.queries import keep_queries

PATTERNS = [None, Causal(), Halo(Grid(4, 6), 2, 1), Halo(Grid(4, 6), 1, 1) | Causal()]


def some(b=2, h=3, n=24, share=0.4):
    return torch.rand(b, h, n) < share


@pytest.mark.parametrize("where", PATTERNS, ids=repr)
def test_pairs_are_those_of_chosen_queries(where):
    chosen = some()
    allowed = torch.ones(24, 24, dtype=torch.bool) if where is None else where.dense(24, 24)
    kept = keep_queries(chosen, 24, where)
    assert kept.dense().equal(chosen[..., None] & allowed)
    kept.schedule.validate()
    assert kept.schedule.pairs_needed == (chosen[..., None] & allowed).sum()


def test_a_selection_keeps_its_cells():
    chosen = some(n=12)
    q_ids, k_ids = (torch.randperm(12).reshape(1, 1, 3, 4) for _ in range(2))
    where = Selection(q_ids, k_ids, n_q=12, n_k=12)
    assert keep_queries(chosen, 12, where).dense().equal(chosen[..., None] & where.dense())


@pytest.mark.parametrize("where", PATTERNS[:3], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "tiles", "reference"])
def test_rows_are_those_of_attention_or_zero_and_gradients_flow(where, backend):
    chosen = some()
    q, k, v = (torch.randn(2, 3, 24, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, where=keep_queries(chosen, 24, where), backend=backend)
    full = attend(q, k, v, where=where, backend="reference") * chosen[..., None]
    torch.testing.assert_close(out, full)
    got, expected = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, full))
    torch.testing.assert_close(got, expected)


def test_shared_choices_and_nobody_chosen():
    chosen = some(1, 1)
    q = torch.randn(2, 3, 24, 4)
    assert attend(q, q, q, where=keep_queries(chosen, 24)).shape == q.shape
    nobody = torch.zeros(2, 3, 24, dtype=torch.bool)
    assert attend(q, q, q, where=keep_queries(nobody, 24)).eq(0).all()
    assert attend(q, q, q, where=keep_queries(nobody, 24, Causal())).eq(0).all()


def test_cells_of_a_pattern_are_made_once_unless_large(monkeypatch):
    chosen = some()
    one, two = (keep_queries(chosen, 24, Causal()).cells[0].mask for _ in range(2))
    assert one is not None
    assert one.data_ptr() == two.data_ptr()
    monkeypatch.setattr(queries, "KEPT_PAIRS", 100)
    assert keep_queries(chosen, 24, Causal()).cells[0].mask.data_ptr() != one.data_ptr()


def test_compiled_code_leaves_gaps_and_gives_the_same():
    chosen = some()
    q = torch.randn(2, 3, 24, 4)

    def run(q, chosen):
        return [attend(q, q, q, where=keep_queries(chosen, 24, where)) for where in (None, Causal())]

    compiled = torch.compile(run, backend="eager")
    torch.testing.assert_close(compiled(q, chosen), run(q, chosen))


@pytest.mark.parametrize("n", [64, 128, 256])
def test_work_is_that_of_the_busiest_head(n):
    chosen = some(n=n)
    q = torch.randn(2, 3, n, 8)
    with watch_plans() as plans:
        attend(q, q, q, where=keep_queries(chosen, n))
    assert plans[0].pairs_needed == chosen.sum() * n
    if plans[0].uses_cells:
        assert plans[0].pairs_computed == 6 * chosen.sum(-1).max() * n


@pytest.mark.parametrize(
    ("chosen", "where", "name"),
    [
        (torch.ones(2, 3, 8), None, "chosen"), (torch.ones(2, 8, dtype=torch.bool), None, "chosen"),
        (torch.ones(1, 1, 8, dtype=torch.bool), "causal", "where"),
        (torch.ones(1, 1, 8, dtype=torch.bool), Halo(Grid(8), 1, 1, border="zero"), "where"),
        (torch.ones(1, 1, 8, dtype=torch.bool), Halo(Grid(9), 1, 1), "n_q"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(chosen, where, name):
    with pytest.raises(ArgumentError, match=name):
        keep_queries(chosen, 8, where)
