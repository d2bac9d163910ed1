"""causal_fir: both forms against a double loop, torch's own convolution, and each other."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.kernels.fir import causal_fir, choose_form, transform_length

SHAPES = [(5,), (5, 3), (5, 3, 4), (1, 3), (12,), (12, 3, 2)]


def loop(x, taps):
    c_out = taps.shape[2] if taps.ndim == 3 else x.shape[2]
    out = x.new_zeros(*x.shape[:2], c_out)
    for t in range(x.shape[1]):
        for lag in range(min(t + 1, taps.shape[0])):
            out[:, t] += x[:, t - lag] @ taps[lag] if taps.ndim == 3 else x[:, t - lag] * taps[lag]
    return out


@pytest.mark.parametrize("form", ["direct", "fft", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_double_loop(shape, form):
    x, taps = torch.randn(2, 8, 3, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(causal_fir(x, taps, form=form), loop(x, taps))


@pytest.mark.parametrize("form", ["direct", "fft"])
def test_vectors_are_a_depthwise_convolution_of_torch(form):
    x, taps = torch.randn(2, 9, 4), torch.randn(5, 4)
    want = functional.conv1d(functional.pad(x.mT, (4, 0)), taps.flip(0).T[:, None], groups=4).mT
    torch.testing.assert_close(causal_fir(x, taps, form=form), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["direct", "fft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_came_before_may_be_handed_on(shape, form):
    x, taps = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    whole = causal_fir(x, taps, form=form)
    reach = max(0, shape[0] - 1)
    for cut in (1, 4, 13):
        late = causal_fir(x[:, cut:], taps, before=x[:, max(0, cut - reach) : cut], form=form)
        torch.testing.assert_close(late, whole[:, cut:])
        torch.testing.assert_close(causal_fir(x[:, cut:], taps, before=x[:, :cut], form=form), whole[:, cut:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["direct", "fft"])
def test_gradients(shape, form):
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: causal_fir(a, b, form=form), (x, taps))


@pytest.mark.parametrize("form", ["direct", "fft"])
def test_half_precision_stays_near_and_empty_batches_pass(form):
    x, taps = torch.randn(2, 64, 3), torch.randn(40, 3) * 0.2
    truth = causal_fir(x, taps)
    half = causal_fir(x.bfloat16(), taps.bfloat16(), form=form)
    assert half.dtype == torch.bfloat16
    assert (half.float() - truth).abs().max() < 0.03 * truth.abs().max()
    assert causal_fir(x[:0], taps, form=form).shape == (0, 64, 3)


def test_long_filters_are_transformed_and_short_ones_are_not():
    assert choose_form(1024, 16, (4, 16)) == "direct"
    assert choose_form(8, 16, (8,)) == "direct"
    for taps in ((1024,), (1024, 16), (1024, 16, 16)):
        assert choose_form(1024, 16, taps) == "fft"
    for n, lags in ((1, 1), (5, 5), (9, 3), (1024, 1024)):
        size = transform_length(n, lags)
        assert n + lags - 1 <= size < 2 * (n + lags)
        assert size & (size - 1) == 0


def test_refusals_name_the_argument():
    x = torch.randn(2, 5, 3)
    with pytest.raises(ArgumentError, match="x:"):
        causal_fir(x[0], torch.randn(3))
    for shape in ((2, 4), (0,), (0, 3), (2, 2, 3), ()):
        with pytest.raises(ArgumentError, match="taps:"):
            causal_fir(x, torch.randn(shape))
    with pytest.raises(ArgumentError, match="before:"):
        causal_fir(x, torch.randn(3), before=torch.randn(1, 2, 3))
    with pytest.raises(ArgumentError, match="form:"):
        causal_fir(x, torch.randn(3), form="toeplitz")
