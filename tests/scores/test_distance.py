import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.scores.distance import ALiBi, DistanceDecay, alibi_slopes
from foveate.scores.pairs import Pairs
from tests.scores.blocks import H, dense_and_cells, gradients


def test_published_slopes():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    want = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    torch.testing.assert_close(alibi_slopes(6), want)
    with pytest.raises(ArgumentError, match="heads"):
        alibi_slopes(0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("align", ["end", "start"])
def test_alibi_equals_a_loop(signed, align):
    slopes, n_q, n_k = torch.rand(H), 3, 5
    got = ALiBi(slopes, signed=signed, align=align).values(Pairs.full(n_q, n_k))[0]
    for i in range(n_q):
        for j in range(n_k):
            offset = j - i - (n_k - n_q if align == "end" else 0)
            torch.testing.assert_close(got[:, i, j], slopes * (offset if signed else -abs(offset)))


@pytest.mark.parametrize("metric", ["manhattan", "euclidean", "squared", "chebyshev"])
def test_decay_equals_a_loop(metric):
    grid, rate = Grid(2, 3, 2), torch.rand(H)
    got = DistanceDecay(rate, grid, metric=metric).values(Pairs.full(12, 12))[0]
    c = grid.coords().float()
    delta = (c[:, None] - c[None]).abs()
    distance = {
        "manhattan": delta.sum(-1),
        "euclidean": delta.square().sum(-1).sqrt(),
        "squared": delta.square().sum(-1),
        "chebyshev": delta.amax(-1),
    }[metric]
    torch.testing.assert_close(got, -rate[:, None, None] * distance)


def test_leading_tokens_are_at_distance_zero():
    got = DistanceDecay(torch.tensor(1.0), Grid(3), lead=1).values(Pairs.full(4, 4))[0, 0]
    assert got.abs()[0].tolist() == [0, 0, 0, 0]
    assert got.abs()[1].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("per_head", [False, True])
def test_cells_equal_dense(per_head):
    slopes = torch.rand(H, dtype=torch.float64)
    for score, n_q in ((ALiBi(slopes), 4), (DistanceDecay(slopes, Grid(2, 3)), 6)):
        want, got = dense_and_cells(score, n_q, 6, per_head=per_head)
        assert torch.equal(want, got)


def test_gradients():
    rate = torch.rand(2, dtype=torch.float64)
    assert gradients(lambda r: {"score": [ALiBi(r), DistanceDecay(r, Grid(2, 2))]}, rate, n_q=4)


def test_bad_values_are_named():
    with pytest.raises(ArgumentError, match=r"ALiBi.slopes"):
        ALiBi(torch.ones(2, 2))
    with pytest.raises(ArgumentError, match=r"ALiBi.align"):
        ALiBi(torch.ones(2), align="middle")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"DistanceDecay.metric"):
        DistanceDecay(torch.ones(2), Grid(4), metric="taxi")  # type: ignore[arg-type]
    q = torch.randn(1, 2, 6, 2)
    with pytest.raises(ArgumentError, match=r"score: ALiBi.slopes.*one per head"):
        attend(q, q, q, score=ALiBi(torch.ones(3)))
    with pytest.raises(ArgumentError, match=r"score: N_q"):
        attend(q, q, q, score=DistanceDecay(torch.ones(2), Grid(4)))
