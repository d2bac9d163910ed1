"""Bucketed tables: the published buckets, the same on every backend, as scores and as factors."""

import math

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.scores.after import Multiply
from foveate.scores.buckets import BucketTable, ClippedOffsets, SignedBuckets, T5Buckets
from foveate.scores.pairs import Pairs
from foveate.scores.relative import RelativeTable
from tests.scores.blocks import H, dense_and_cells, gradients


def t5(offset, buckets, max_distance, bidirectional):
    row, n = 0, -offset
    if bidirectional:
        buckets //= 2
        row, n = (buckets if offset > 0 else 0), abs(offset)
    n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return row + n
    far = exact + int(math.log(n / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-6)
    return row + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 20), (8, 100)])
def test_t5_buckets(buckets, max_distance, bidirectional):
    offsets = torch.arange(-200, 201)
    rule = T5Buckets(buckets, max_distance, bidirectional)
    assert rule(offsets).tolist() == [t5(o, buckets, max_distance, bidirectional) for o in offsets.tolist()]
    assert int(rule(offsets).max()) == rule.rows - 1


def test_signed_buckets_follow_the_order_of_offsets():
    rule = SignedBuckets(16, 20)
    rows = rule(torch.arange(-60, 61))
    assert (rows.diff() >= 0).all()
    assert rows.unique().tolist() == list(range(rule.rows))
    assert rows.flip(0).tolist() == [rule.rows - 1 - r for r in rows.tolist()]
    gap = SignedBuckets(16, 20, gap=2)
    assert gap.rows == 17
    assert gap(torch.tensor([-1, 0])).tolist() == [6, 9]
    short = SignedBuckets(16, 20, gap=2, length=4)
    assert short(torch.arange(-3, 1)).tolist() == [0, 1, 2, 5]


def test_clipped_offsets_are_a_clipped_relative_table():
    table = torch.randn(2, 7)
    got = BucketTable(table, ClippedOffsets(3)).values(Pairs.full(9, 9))
    want = RelativeTable(table, Grid(9), "key-query", clip=True).values(Pairs.full(9, 9))
    assert torch.equal(got, want)
    with pytest.raises(ArgumentError, match="reach"):
        ClippedOffsets(-1)


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("align", ["end", "start"])
def test_cells_equal_dense(heads, per_head, align):
    score = BucketTable(torch.randn(heads, 8).double(), T5Buckets(8, 6), align)
    want, got = dense_and_cells(score, 5, 9, per_head=per_head)
    assert torch.equal(want, got)
    want, got = dense_and_cells(Multiply(score), 5, 9, per_head=per_head)
    assert torch.equal(want, got)


def test_values_and_gradients():
    table = torch.randn(2, 8, dtype=torch.float64)
    values = BucketTable(table, T5Buckets(8, 6)).values(Pairs.full(3, 4))[0]
    for i in range(3):
        for j in range(4):
            assert torch.equal(values[:, i, j], table[:, T5Buckets(8, 6)(torch.tensor(j - i - 1))])
    assert gradients(lambda t: {"score": BucketTable(t, T5Buckets(8, 6))}, table)
    assert gradients(lambda t: {"after": Multiply(BucketTable(t, T5Buckets(8, 6)))}, table)


@pytest.mark.parametrize("backend", ["tiles", "sdpa"] if absent() else ["cpu", "tiles", "sdpa"])
@pytest.mark.parametrize("where", [Causal(), SlidingWindow(9, 4)], ids=repr)
@pytest.mark.parametrize("n_q", [40, 3])
def test_backends_agree_with_the_reference(backend, where, n_q):
    q, k = torch.randn(2, 4, n_q, 8, requires_grad=True), torch.randn(2, 4, 40, 8, requires_grad=True)
    table = torch.randn(4, 32, requires_grad=True)

    def run(name):
        out = attend(q, k, k, where=where, score=BucketTable(table, T5Buckets()), backend=name)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, table))

    for a, b in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(absent() is not None, reason="the C++ core is not built")
def test_the_core_refuses_factors_after_the_rule_with_its_reason():
    q = torch.randn(1, 1, 8, 8)
    factor = Multiply(BucketTable(torch.randn(1, 32), T5Buckets()))
    with pytest.raises(Exception, match="Multiply changes the weights"):
        attend(q, q, q, where=Causal(), after=factor, backend="cpu")
    want = attend(q, q, q, where=Causal(), after=factor, backend="reference")
    torch.testing.assert_close(attend(q, q, q, where=Causal(), after=factor), want)


def test_it_prints_and_names_what_does_not_fit():
    score = BucketTable(torch.zeros(2, 32), T5Buckets())
    assert repr(score) == (
        "BucketTable(table=Tensor(2, 32), buckets=T5Buckets(buckets=32, max_distance=128, bidirectional=True))"
    )
    with pytest.raises(ArgumentError, match=r"BucketTable\.table"):
        BucketTable(torch.zeros(2, 31), T5Buckets())
    with pytest.raises(ArgumentError, match=r"T5Buckets\.buckets"):
        T5Buckets(2)
    with pytest.raises(ArgumentError, match=r"SignedBuckets\.max_distance"):
        SignedBuckets(32, 8)
    q = torch.zeros(1, 3, 5, 2)
    with pytest.raises(ArgumentError, match=r"2|heads"):
        attend(q, q, q, score=score)
