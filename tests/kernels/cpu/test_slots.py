"""Cells whose outputs are summed, averaged or weighted, on the core and on the reference."""

import pytest
import torch

from foveate.core.errors import UnsupportedError
from foveate.kernels.attend import attend
from foveate.kernels.problem import Problem
from foveate.kernels.select import plan
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Mean, Schedule, Weights
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.rules import Sigmoid
from foveate.scores.temperature import RowFactor, SoftCap

B, H, N_Q, N_K = 2, 4, 40, 50


def ids(lead, cells, size, n, seed, absent=0.1):
    """Distinct ids within a cell, some of them absent; a row may stand in several cells or in none."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(*lead, cells, n, generator=g).argsort(-1)[..., :size]
    return torch.where(torch.rand(order.shape, generator=g) < absent, -1, order)


def schedule(lead, combine, weights=None):
    mask = torch.rand(*lead, 3, 9, 70 % N_K, generator=torch.Generator().manual_seed(7)) < 0.7
    groups = (
        ExplicitGroup(ids(lead, 5, 17, N_Q, 1), ids((1, 1), 5, 30, N_K, 2)),
        ExplicitGroup(ids((1, 1), 3, 9, N_Q, 3), ids(lead, 3, 20, N_K, 4), mask),
    )
    return Schedule(N_Q, N_K, groups, Weights(*weights) if combine == "weights" else combine)


@pytest.mark.parametrize("lead", [(1, 1), (B, H), (1, H)], ids=str)
@pytest.mark.parametrize("combine", ["sum", Mean(), Mean(0.5), "weights"], ids=str)
@pytest.mark.parametrize("options", ["plain", "scored", "sigmoid"])
def test_equal_to_the_reference(lead, combine, options):
    torch.manual_seed(0)
    leaves = [torch.randn(B, H, N_Q, 12), torch.randn(B, 2, N_K, 12), torch.randn(B, 2, N_K, 16)]
    leaves += [torch.randn(1, 1, 5, 17), torch.randn(B, H, 3, 9)] if combine == "weights" else []
    extra = {}
    if options == "scored":
        factor, bias, pairs = torch.rand(1, H, N_Q), torch.randn(B, 1, N_K), torch.randn(1, H, N_Q, N_K)
        leaves += [factor, bias]
    leaves = [x.requires_grad_() for x in leaves]
    if options == "scored":
        factor, bias = leaves[-2:]
        score = (
            [RowFactor(factor), KeyBias(bias)] + ([Bias(pairs)] if lead == (1, 1) else []) + [SoftCap(3.0)]
        )
        extra = {"score": score}
    elif options == "sigmoid":
        extra = {"weigh": Sigmoid(-1.0)}
    where = schedule(lead, combine, leaves[3:5])
    got, want = (
        attend(*leaves[:3], where=where, backend=backend, **extra) for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    seed = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(want, leaves, seed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_copied_is_refused():
    x = torch.randn(B, H, N_Q, 8)
    where = schedule((B, H), "sum")
    k = torch.randn(B, H, N_K, 8)
    with pytest.raises(UnsupportedError, match="cannot follow Bias"):
        attend(x, k, k, where=where, score=Bias(torch.randn(N_Q, N_K)), backend="cpu")
    with pytest.raises(UnsupportedError, match="cannot follow the mask"):
        attend(x, k, k, where=where, mask=torch.ones(N_Q, N_K, dtype=torch.bool), backend="cpu")
    assert (
        attend(x, k, k, where=where, mask=torch.ones(N_K, dtype=torch.bool), backend="cpu").isfinite().all()
    )


def test_chosen_and_counted():
    problem = Problem.of((1, 4, N_Q, 16), (1, 4, N_K, 16), (1, 4, N_K, 16), where=schedule((1, 1), Mean()))
    chosen = plan(problem, "cpu")
    assert chosen.pairs_computed == 4 * (5 * 17 * 30 + 3 * 9 * 20)


@pytest.mark.parametrize("backend", ["cpu", "tiles", "reference"])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 9), (9, 1), (1, 1)])
def test_single_rows(backend, n_q, n_k):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, n_q, 8), torch.randn(1, 2, n_k, 8)
    group = ExplicitGroup(torch.arange(n_q).expand(1, 1, 3, n_q), torch.arange(n_k).expand(1, 1, 3, n_k))
    out = attend(q, k, k, where=Schedule(n_q, n_k, (group,), Mean()), backend=backend)
    torch.testing.assert_close(out, attend(q, k, k), rtol=1e-5, atol=1e-6)
