import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.scores.pairs import Pairs
from foveate.scores.temperature import RowFactor, SoftCap
from tests.scores.blocks import B, H, dense_and_cells, gradients


@pytest.mark.parametrize("shape", [(B, H, 5), (H, 1), (5,), (1, H, 5), (B, 1, 1)])
@pytest.mark.parametrize("per_head", [False, True])
def test_row_factor_multiplies_rows(shape, per_head):
    t = torch.randn(shape, dtype=torch.float64)
    base = torch.randn(B, H, 5, 6, dtype=torch.float64)
    want, got = dense_and_cells(RowFactor(t), 5, 6, per_head=per_head, base=base)
    assert torch.equal(want, got)
    assert torch.equal(RowFactor(t).apply(base, Pairs.full(5, 6)), base * t.expand(B, H, 5)[..., None])


def test_temperature_equals_scale():
    q, k, v = (torch.randn(1, 2, 4, 3) for _ in range(3))
    hot = attend(q, k, v, score=RowFactor(torch.tensor([3.0])), scale=0.5, backend="reference")
    torch.testing.assert_close(hot, attend(q, k, v, scale=1.5, backend="reference"))


def test_soft_cap_bounds_and_keeps_small_logits():
    x = torch.linspace(-1e4, 1e4, 7, dtype=torch.float64).reshape(1, 1, 1, 7)
    y = SoftCap(30.0).apply(x, Pairs.full(1, 7))
    assert y.abs().max() <= 30
    torch.testing.assert_close(SoftCap(30.0).apply(x * 1e-7, Pairs.full(1, 7)), x * 1e-7, rtol=1e-8, atol=0)  # type: ignore


def test_gradients():
    assert gradients(lambda t: {"score": RowFactor(t) + SoftCap(2.0)}, torch.rand(2, 3, dtype=torch.float64))


def test_bad_values_are_named():
    with pytest.raises(ArgumentError, match=r"SoftCap.cap"):
        SoftCap(0.0)
    q = torch.randn(2, 3, 4, 2)
    with pytest.raises(ArgumentError, match=r"score: RowFactor.t.*\(5,\)"):
        attend(q, q, q, score=RowFactor(torch.ones(5)))
    with pytest.raises(ArgumentError, match=r"RowFactor.t"):
        attend(q, q, q, score=RowFactor(torch.ones(4, dtype=torch.long)))
