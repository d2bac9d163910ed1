"""Relative logits: skewing equals the naive gather, its way back the sum by offset; no backend disagrees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.offsets import Spans
from foveate.scores.pairs import Pairs
from foveate.scores.skew import RelativeLogits, relative_values, skew, unskew
from tests.scores.blocks import B, H, dense_and_cells, gradients


def naive(rows, n_k, first, shift):
    n_q, r = rows.shape[-2:]
    out = rows.new_zeros(*rows.shape[:-1], n_k)
    for i in range(n_q):
        for j in range(n_k):
            if 0 <= j - i - shift - first < r:
                out[..., i, j] = rows[..., i, j - i - shift - first]
    return out


sizes = {
    "n_q": st.integers(0, 6),
    "n_k": st.integers(0, 6),
    "r": st.integers(1, 7),
    "first": st.integers(-8, 4),
    "shift": st.none() | st.integers(-3, 3),
}


@given(**sizes)
def test_skew_equals_the_naive_gather(n_q, n_k, r, first, shift):
    rows = torch.randn(2, n_q, r)
    real = n_k - n_q if shift is None else shift
    assert torch.equal(skew(rows, n_k, first=first, shift=shift), naive(rows, n_k, first, real))


@given(**sizes)
def test_unskew_is_the_transpose_of_skew_and_its_inverse_where_there_are_pairs(n_q, n_k, r, first, shift):
    rows, weights = torch.randn(2, n_q, r).double(), torch.randn(2, n_q, n_k).double()
    there = skew(rows, n_k, first=first, shift=shift)
    back = unskew(weights, r, first=first, shift=shift)
    torch.testing.assert_close((there * weights).sum(), (rows * back).sum())
    known = unskew(torch.ones(n_q, n_k), r, first=first, shift=shift) > 0
    assert torch.equal(unskew(there, r, first=first, shift=shift), rows * known)


def test_unskew_after_skew_is_the_identity_on_the_lower_triangle():
    weights = torch.randn(3, 7, 7).tril()
    rows = unskew(weights, 7, first=-6)
    assert torch.equal(skew(rows, 7, first=-6), weights)


@given(n=st.integers(1, 9), m=st.integers(1, 12), d=st.integers(1, 4))
def test_logits_equal_products_with_gathered_embeddings(n, m, d):
    # Fewer embeddings than tokens, as many, and more.
    q, table = torch.randn(B, H, n, d).double(), torch.randn(H, m, d).double()
    found = RelativeLogits(q @ table.mT, first=1 - m).values(Pairs.full(n, n))
    for i in range(n):
        for j in range(i + 1):
            want = (
                (q[:, :, i] * table[:, m - 1 - (i - j)]).sum(-1) if i - j < m else torch.zeros(B, H).double()
            )
            torch.testing.assert_close(found[:, :, i, j], want)


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", [(B, H), (1, 1), (B, 1)])
@pytest.mark.parametrize("n_q", [1, 5])
def test_cells_equal_dense(shape, per_head, align, n_q):
    score = RelativeLogits(torch.randn(*shape, n_q, 6).double(), -3, align)
    want, got = dense_and_cells(score, n_q, 9, per_head=per_head)
    assert torch.equal(want, got)


def test_gradients():
    assert gradients(lambda u: {"score": RelativeLogits(u, -2)}, torch.randn(1, 2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["tiles", "sdpa"] if absent() else ["cpu", "tiles", "sdpa"])
@pytest.mark.parametrize("where", [None, Causal(), SlidingWindow(5), Causal() & Spans(8, 8, -1, 0)], ids=repr)
@pytest.mark.parametrize(("n_q", "first", "r"), [(40, -7, 8), (40, -63, 64), (3, -20, 41), (40, 5, 3)])
def test_backends_agree_with_the_reference(backend, where, n_q, first, r):
    if where is None and backend == "tiles":
        where = Full()
    q, k, v = torch.randn(2, 4, n_q, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(2, 4, n_q, r))]

    def run(name):
        out = attend(*leaves[:3], where=where, score=RelativeLogits(leaves[3], first), backend=name)
        return out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)

    for a, b in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(a, b if b is not None else torch.zeros_like(a), rtol=1e-4, atol=1e-5)


def test_values_by_offset_equal_the_sum_over_pairs():
    weights, table = torch.rand(B, H, 4, 9).double(), torch.randn(H, 5, 3).double()
    want = torch.zeros(B, H, 4, 3).double()
    for i in range(4):
        for j in range(9):
            o = j - (i + 5) + 4
            if 0 <= o < 5:
                want[:, :, i] += weights[:, :, i, j, None] * table[:, o]
    torch.testing.assert_close(relative_values(weights, table, first=-4), want)


def test_it_prints_composes_and_names_what_does_not_fit():
    score = RelativeLogits(torch.zeros(1, 1, 4, 3), first=-2)
    assert repr(score + score) == " + ".join(["RelativeLogits(U=Tensor(1, 1, 4, 3), first=-2)"] * 2)
    q = torch.zeros(1, 1, 5, 2)
    with pytest.raises(ArgumentError, match=r"RelativeLogits\.U"):
        attend(q, q, q, score=score)
    with pytest.raises(ArgumentError, match=r"first"):
        RelativeLogits(torch.zeros(1, 1, 4, 3), first=0.5)
