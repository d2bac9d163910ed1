import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.scores.after import Add, Dropout, Multiply, as_afters
from foveate.scores.relative import RelativeTable
from tests.scores.blocks import B, H, dense_and_cells, gradients


@pytest.mark.parametrize("shape", [(B, H, 5, 6), (H, 1, 6), (5, 1), (5, 6)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", [Multiply, Add])
def test_maps_are_read_alike_on_cells(kind, shape, per_head):
    want, got = dense_and_cells(kind(torch.randn(shape, dtype=torch.float64)), 5, 6, per_head=per_head)
    assert torch.equal(want, got)


def test_after_follows_the_softmax_and_nothing_renormalises():
    q, k, v = (torch.randn(2, 3, 4, 5) for _ in range(3))
    f, t = torch.randn(4, 4), torch.randn(2, 3, 4, 4)
    weights = (q @ k.mT / 5**0.5).softmax(-1)
    got = attend(q, k, v, after=[Multiply(f), Add(t)], backend="reference")
    torch.testing.assert_close(got, (weights * f + t) @ v)
    got = attend(q, k, v, after=[Add(t), Multiply(f)], backend="reference")
    torch.testing.assert_close(got, ((weights + t) * f) @ v)


def test_pairs_that_may_not_attend_stay_at_zero():
    q = torch.randn(1, 1, 3, 2)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out = attend(q, q, torch.eye(3)[None, None], mask=mask, after=Add(torch.ones(3, 3)), backend="reference")
    assert torch.equal(out[0, 0] != 0, mask)
    floats = torch.zeros(3, 3).masked_fill(~mask, float("-inf"))
    same = attend(
        q, q, torch.eye(3)[None, None], mask=floats, after=Add(torch.ones(3, 3)), backend="reference"
    )
    assert torch.equal(out, same)


def test_a_relative_table_makes_a_toeplitz_factor():
    q, table = torch.randn(1, 2, 4, 3), torch.randn(2, 7)
    toeplitz = torch.stack([table[:, 3 - i : 7 - i] for i in range(4)], 1)
    got = attend(q, q, q, after=Multiply(RelativeTable(table, Grid(4))), backend="reference")
    torch.testing.assert_close(got, attend(q, q, q, after=Multiply(toeplitz), backend="reference"))


def test_dropout_follows_its_generator():
    q = torch.randn(1, 2, 8, 4)
    draw = lambda seed: attend(  # noqa: E731
        q, q, q, after=Dropout(0.5, torch.Generator().manual_seed(seed)), backend="reference"
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_dropout_keeps_the_mean():
    q, eye = torch.zeros(1, 1, 64, 2), torch.eye(64)[None, None]
    total = torch.zeros(64, 64)
    g = torch.Generator().manual_seed(0)
    for _ in range(64):
        total += attend(q, q, eye, after=Dropout(0.25, g), backend="reference")[0, 0] * 64 / 64
    # 64^3 draws of mean 1, standard deviation sqrt(p / (1 - p)): the mean errs by 0.0011.
    assert abs(total.mean() - 1) < 0.006
    values = attend(q, q, eye, after=Dropout(0.25, g), backend="reference").unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 64 / 0.75]))


def test_dropout_limits_and_given_draws():
    q = torch.randn(1, 2, 4, 3)
    assert torch.equal(
        attend(q, q, q, after=Dropout(0.0), backend="reference"), attend(q, q, q, backend="reference")
    )
    assert attend(q, q, q, after=Dropout(1.0), backend="reference").abs().max() == 0
    keep = torch.rand(4, 4) < 0.5
    given = attend(q, q, q, after=Dropout(0.5, keep=keep), backend="reference")
    torch.testing.assert_close(given, attend(q, q, q, after=Multiply(keep * 2.0), backend="reference"))


def test_gradients():
    f, t = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    keep = torch.rand(3, 4) < 0.7
    assert gradients(lambda f, t: {"after": [Multiply(f), Add(t), Dropout(0.3, keep=keep)]}, f, t)


def test_bad_values_are_named():
    q = torch.randn(1, 2, 4, 3)
    with pytest.raises(ArgumentError, match=r"Dropout.p"):
        Dropout(1.5)
    with pytest.raises(ArgumentError, match=r"after: Dropout.keep"):
        attend(q, q, q, after=Dropout(0.5, keep=torch.ones(4, 4)))
    with pytest.raises(ArgumentError, match=r"after: Multiply.factor"):
        attend(q, q, q, after=Multiply(torch.ones(3, 4)))
    with pytest.raises(ArgumentError, match=r"after: Add.term"):
        attend(q, q, q, after=Add(2.0))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^after: .*Multiply"):
        as_afters(torch.ones(3))  # type: ignore[arg-type]


def test_repr_is_readable():
    assert repr(Dropout(0.1)) == "Dropout(p=0.1)"
    assert repr(Multiply(torch.ones(2, 3))) == "Multiply(factor=Tensor(2, 3))"
