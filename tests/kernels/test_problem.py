import pytest
import torch

from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.problem import Problem
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.scores.bias import KeyBias
from foveate.scores.rules import Exp, ReLU, Sigmoid

X = torch.randn(2, 4, 6, 3)


def shaped(*shape, **options):
    return torch.zeros(shape, **options)


def selection(b=1, h=1, combine="lse"):
    ids = torch.arange(6).reshape(1, 1, 2, 3).expand(b, h, 2, 3)
    return Selection(ids, ids, n_q=6, n_k=6, combine=combine)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (X[0], X, X, r"^q: expected 4 dimensions .*x\[None\]"),
        (X, X[None], X, r"^k: .*Flatten the grid"),
        (X, X, X[0, 0], r"^v: "),
        ([1.0], X, X, r"^q: expected a tensor"),
        (X.long(), X, X, r"^q.dtype: .*int64.*\.float\(\)"),
        (X, X.int(), X, r"^k.dtype: .*int32"),
        (X, X.half(), X, r"^k.dtype: expected torch.float32.*k.to\(q.dtype\)"),
        (X, X, X.double(), r"^v.dtype: "),
        (X, X.to("meta"), X, r"^k.device: .*'meta'.*k.to\(q.device\)"),
        (X, X, X.to("meta"), r"^v.device: "),
        (X, shaped(2, 4, 6, 2), X, r"^k: .*head size 3"),
        (X, X, shaped(2, 4, 5, 3), r"^v: expected 6 rows"),
        (X, X, shaped(2, 2, 6, 3), r"^v: expected 4 heads"),
        (X, shaped(2, 3, 6, 3), shaped(2, 3, 6, 3), r"^k: .*divides the 4 heads"),
        (X, shaped(2, 0, 6, 3), shaped(2, 0, 6, 3), r"^k: .*divides"),
        (X, shaped(3, 4, 6, 3), shaped(3, 4, 6, 3), r"^batch of q, k, v: .*\(2, 3, 3\)"),
        (shaped(2, 4, 6, 0), shaped(2, 4, 6, 0), X, r"^q: expected a head size of at least 1"),
    ],
)
def test_bad_tensors_are_named(q, k, v, message):
    with pytest.raises(ArgumentError, match=message):
        attend(q, k, v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(6, 6, dtype=torch.long)}, r"^mask: .*int64"),
        (
            {"mask": torch.ones(5, 6, dtype=torch.bool)},
            r"^mask: .*broadcasts to .* = \(2, 4, 6, 6\), got \(5, 6\)",
        ),
        ({"mask": torch.ones(1, 2, 4, 6, 6)}, r"^mask: "),
        ({"mask": torch.full((6, 6), float("nan"))}, r"^mask: .*NaN.*-inf"),
        ({"mask": torch.ones(6, 6, device="meta")}, r"^mask: .*meta"),
        ({"mask": "causal"}, r"^mask: .*'causal'.*where="),
        ({"where": torch.ones(6, 6, dtype=torch.bool)}, r"^where: .*Explicit"),
        ({"where": "causal"}, r"^where: .*'causal'"),
        ({"where": Causal}, r"^where: "),
        ({"where": Neighborhood(Grid(7), 3)}, r"Grid\(7\)"),
        ({"where": selection(3, 1)}, r"^where: .*1 or 2.*\(3, 1\)"),
        ({"where": selection(1, 2)}, r"^where: "),
        ({"scale": torch.ones(4)}, r"^scale: .*RowFactor"),
        ({"scale": "auto"}, r"^scale: "),
        ({"return_lse": True, "weigh": Sigmoid()}, r"^return_lse: .*Sigmoid\(\).*row sum"),
        ({"return_lse": True, "weigh": ReLU()}, r"^return_lse: "),
        ({"return_lse": True, "weigh": Exp()}, r"^return_lse: "),
        ({"return_lse": True, "where": selection(combine="sum")}, r"^return_lse: .*'sum'"),
        ({"return_lse": True, "where": selection(combine=Mean(0.01))}, r"^return_lse: .*Mean"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        attend(X, X, X, **options)


def test_selection_of_other_lengths_is_refused():
    ids = torch.arange(4).reshape(1, 1, 1, 4)
    with pytest.raises(ArgumentError, match=r"^n_q: expected 4.*got 6"):
        attend(X, X, X, where=Selection(ids, ids, n_q=4, n_k=4))


def test_unknown_backend_names_its_neighbours():
    with pytest.raises(UnknownNameError, match="'reference'"):
        attend(X, X, X, backend="referense")


def test_float_mask_with_infinities_is_fine():
    mask = torch.full((6, 6), float("-inf")).triu(1)
    assert torch.isfinite(attend(X, X, X, mask=mask)).all()


def test_bare_shapes_become_meta_tensors():
    problem = Problem.of((2, 8, 36, 16), (1, 2, 36, 16), (2, 2, 36, 5), dtype=torch.bfloat16, where=Causal())
    assert (problem.batch, problem.heads, problem.kv_heads, problem.n_q) == (2, 8, 2, 36)
    assert (problem.d, problem.d_v, problem.dtype, problem.accumulate) == (
        16,
        5,
        torch.bfloat16,
        torch.float32,
    )
    assert problem.q.device.type == "meta"
    assert problem.device.type == "cpu"
    with pytest.raises(ArgumentError, match=r"^k: "):
        Problem.of(X, (2, 4, 6, 3), X)  # type: ignore[arg-type]


def test_what_a_problem_tells():
    assert Problem.of(X, X, X).combine == "lse"
    assert Problem.of(X, X, X).allowed() is None
    assert Problem.of(X, X, X, where=selection(combine="sum")).one_rule is False
    assert Problem.of(X, X, X, where=Causal()).allowed().shape == (1, 1, 6, 6)
    b = torch.zeros(6, requires_grad=True)
    assert Problem.of(X, X, X, score=KeyBias(b)).needs_grad
    with torch.no_grad():
        assert not Problem.of(X, X, X, score=KeyBias(b)).needs_grad
    assert not Problem.of(X, X, X).needs_grad


def test_phantom_keys_are_padded_away():
    where = Halo(Grid(2, 3), (2, 3), 1, border="zero")
    problem = Problem.of(X, X, X, where=where)
    assert problem.n_k == 4 * 5
    assert problem.frame is not None
    assert problem.k.reshape(2, 4, 4, 5, 3)[:, :, 1:3, 1:4].reshape(X.shape).equal(X)
    assert problem.k.abs().sum().isclose(X.abs().sum())
    assert problem.allowed().all()
