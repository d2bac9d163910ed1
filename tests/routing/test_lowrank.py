"""Low-rank prediction: coefficients, thinning, and the best keys of each row."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing import lowrank
from foveate.routing.lowrank import (
    FewCoefficients,
    LowRankPredictor,
    Sparsity,
    best_keys,
    best_mask,
    mask_above,
)


def test_coefficients_are_a_softmax_of_narrowed_products():
    module = LowRankPredictor(6, 4, rank=3, reduced=2).double()
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64).unbind(0)
    truth = module.proj_c_q(q) @ (module.proj_c_k(k).mT @ module.proj_n) * 2**-0.5
    torch.testing.assert_close(module(q, k), truth.softmax(-1))
    kept = torch.tensor([[True, True, False, True, True, True]])
    masked = module(q, k, q_kept=kept, k_kept=kept)
    torch.testing.assert_close(masked[:, :, 2], torch.full((1, 2, 3), 1 / 3, dtype=torch.float64))
    moved = k.clone()
    moved[:, :, 2] += 10
    torch.testing.assert_close(module(q, moved, k_kept=kept), module(q, k, k_kept=kept))


def test_one_matrix_may_serve_both_ways():
    module = LowRankPredictor(6, 4, rank=3, reduced=2, share=True)
    assert module.basis.data_ptr() == module.proj_n.data_ptr()
    assert sum(p.numel() for p in module.parameters()) == 2 * (4 * 2 + 2) + 6 * 3


def test_thinning_keeps_the_largest_without_normalising():
    c = torch.tensor([0.5, 0.1, 0.3, 0.1])
    assert Sparsity(coefficients=2).thin(c).tolist() == pytest.approx([0.5, 0, 0.3, 0])
    assert Sparsity(coefficients=9).thin(c).equal(c)
    assert Sparsity(coefficients=None, coefficient_threshold=0.2).thin(c).tolist() == pytest.approx(
        [0.5, 0, 0.3, 0]
    )
    basis = torch.tensor([[-0.5, 0.01, 0.03]])
    assert Sparsity().thin_basis(basis)[0].tolist() == pytest.approx([0.5, 0, 0.03])
    assert Sparsity(keep=0.3).budget(17) == 6


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_best_keys_in_pieces(monkeypatch, chunk):
    monkeypatch.setattr(lowrank, "_CHUNK", chunk)
    c, basis = torch.rand(2, 3, 5, 4), torch.rand(4, 8)
    keys = best_keys(c, basis, 3)
    truth = (c @ basis).topk(3, dim=-1).indices
    assert keys.sort(dim=-1).values.equal(truth.sort(dim=-1).values)
    # scaling a row by a positive number changes nothing
    assert (
        best_keys(c * torch.rand(2, 3, 5, 1).add(0.1), basis, 3).sort(-1).values.equal(truth.sort(-1).values)
    )
    kept = torch.zeros(2, 8, dtype=torch.bool)
    kept[0, :2], kept[1, 3:] = True, True
    few = best_keys(c, basis, 3, kept)
    assert few[0].sort(-1).values.eq(torch.tensor([-1, 0, 1])).all()
    assert (few[1] >= 3).all()


def test_masks_and_lists_name_the_same_keys_of_few_or_all_coefficients(monkeypatch):
    monkeypatch.setattr(lowrank, "_PIECE", 200)
    monkeypatch.setattr(lowrank, "_CHUNK", 300)
    sparsity = Sparsity(coefficients=3)
    c = torch.rand(2, 3, 7, 16, dtype=torch.float64)
    basis = torch.rand(40, 16, dtype=torch.float64).mT  # a transpose, as that of a predictor
    few, thin = sparsity.select(c), sparsity.thin(c)
    assert isinstance(few, FewCoefficients)
    assert few.dense(16).equal(thin)
    kept = torch.rand(2, 40) > 0.3
    for present in (None, kept):
        scores = thin @ basis
        if present is not None:
            scores = scores.masked_fill(~present[:, None, None, :], float("-inf"))
        best = scores.topk(10, dim=-1).indices
        truth = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, best, True)
        for rows in (few, thin):
            assert best_mask(rows, basis, 10, present).equal(truth)
            assert best_keys(rows, basis, 10, present).sort(-1).values.equal(best.sort(-1).values)
            assert mask_above(rows, basis, 0.4, present).equal(scores > 0.4)
    # Where the list would not be much shorter there is none.
    assert isinstance(Sparsity(coefficients=5).select(c), torch.Tensor)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Sparsity(keep=0.0), "keep"),
        (lambda: Sparsity(coefficients=0), "coefficients"),
        (lambda: Sparsity(basis_threshold=-1), "basis_threshold"),
        (lambda: Sparsity(coefficient_threshold=-1), "coefficient_threshold"),
        (lambda: LowRankPredictor(6, 4, rank=0, reduced=2), "rank"),
        (lambda: best_keys(torch.rand(1, 1, 2, 3), torch.rand(3, 4), 5), "budget"),
        (lambda: best_mask(torch.rand(1, 1, 2, 3), torch.rand(3, 4), 0), "budget"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ArgumentError, match=name):
        make()
