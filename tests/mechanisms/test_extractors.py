"""Extractors: the properties of the family. The equations are a reconstruction; nothing here is the authors'."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.core.registry import get_system
from foveate.kernels.fir import causal_fir
from foveate.mechanisms.linear.extractors import Extractor, Window
from foveate.mechanisms.past import past_bytes

VARIANTS = ("she", "he", "we", "me")
each = pytest.mark.parametrize("variant", VARIANTS)


def layer(variant="he", dim=6, length=10, **options) -> Extractor:
    torch.manual_seed(0)
    return Extractor(dim=dim, length=length, variant=variant, **options).double()


def tokens(n=10, dim=6, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def opened(module: Extractor) -> Extractor:
    """Make every projection the identity and the adjustment 1."""
    with torch.no_grad():
        for linear in (module.value, module.proj):
            if linear is not None:
                linear.weight.copy_(torch.eye(module.dim))
                linear.bias.zero_()
        if module.adjust is not None:
            module.adjust.weight.zero_()
            module.adjust.bias.fill_(1.0)
    return module


@each
@pytest.mark.parametrize("form", ["direct", "fft"])
def test_equals_the_sum_written_out(variant, form):
    module, x = layer(variant, form=form), tokens()
    v = x if module.value is None else module.value(x)
    e = torch.zeros_like(x)
    for t in range(10):
        for i in range(t + 1):
            weight = module.taps[i]
            e[:, t] += v[:, t - i] @ weight if variant == "she" else v[:, t - i] * weight
    want = e if variant == "me" else module.proj(e * module.adjust(x))
    torch.testing.assert_close(module(x, Grid(10)), want)


@each
def test_shifting_the_input_shifts_the_extraction(variant):
    module, x = layer(variant, length=16), tokens()
    if module.value is not None:
        nn.init.zeros_(module.value.bias)
    shifted = functional.pad(x, (0, 0, 4, 0))
    whole = module.extract(shifted)[0]
    torch.testing.assert_close(whole[:, 4:], module.extract(x)[0])
    assert whole[:, :4].abs().max() < 1e-12


@pytest.mark.parametrize("variant", ["he", "we", "me"])
def test_identity_and_moving_average(variant):
    module, x = opened(layer(variant)), tokens()
    with torch.no_grad():
        module.taps.zero_()
        module.taps[0] = 1.0
    torch.testing.assert_close(module(x, Grid(10)), x)
    module = opened(layer(variant, length=4))
    nn.init.constant_(module.taps, 1 / 4)
    want = torch.stack([x[:, max(0, t - 3) : t + 1].sum(1) / 4 for t in range(10)], dim=1)
    torch.testing.assert_close(module(x, Grid(10)), want)


def test_he_is_a_depthwise_convolution():
    module, x = opened(layer("he", length=5)), tokens()
    conv = nn.Conv1d(6, 6, 5, groups=6, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(module.taps.flip(0).T.unsqueeze(1))
    torch.testing.assert_close(module(x, Grid(10)), conv(functional.pad(x.mT, (4, 0))).mT)


def test_she_contains_he_contains_we():
    x = tokens()
    she, he, we = (opened(layer(v)) for v in ("she", "he", "we"))
    with torch.no_grad():
        he.taps.copy_(we.taps[:, None].expand(-1, 6))
        she.taps.copy_(torch.diag_embed(he.taps))
    torch.testing.assert_close(he(x, Grid(10)), we(x, Grid(10)))
    torch.testing.assert_close(she(x, Grid(10)), he(x, Grid(10)))


@pytest.mark.parametrize("variant", ["she", "he", "we"])
def test_linear_in_the_past_and_quadratic_in_the_present(variant):
    module, x = layer(variant), tokens()
    direction = torch.randn(2, 6, dtype=torch.float64)

    def at(place, scale):
        moved = x.clone()
        moved[:, place] += scale * direction
        return module(moved, Grid(10))[:, 8]

    past = [at(3, s) for s in range(3)]
    torch.testing.assert_close(past[2] - past[1], past[1] - past[0])
    now = [at(8, s) for s in range(4)]
    second = [now[i + 2] - 2 * now[i + 1] + now[i] for i in range(2)]
    assert second[0].abs().max() > 1e-3
    torch.testing.assert_close(second[0], second[1])


def test_me_is_linear():
    module, x, y = layer("me"), tokens(), tokens()
    torch.testing.assert_close(module(2 * x - y, Grid(10)), 2 * module(x, Grid(10)) - module(y, Grid(10)))


@each
@pytest.mark.parametrize("length", [1, 4, 30])
def test_decoding_equals_the_whole_and_its_window_does_not_grow(variant, length):
    module, x = layer(variant, length=length), tokens()
    want = module(x, Grid(10))
    out, past = module.prefill(x[:, :3])
    outs, sizes = [out], [past_bytes(past)]
    for t in range(3, 10):
        out, past = module.step(x[:, t], past)
        outs.append(out.unsqueeze(1))
        sizes.append(past_bytes(past))
    torch.testing.assert_close(torch.cat(outs, dim=1), want)
    assert set(sizes) == {2 * (length - 1) * 6 * 8}
    first, _ = module.step(x[:, 0])
    torch.testing.assert_close(first, want[:, 0])


@each
def test_sees_as_far_as_its_length(variant):
    module, x = layer(variant, length=4), tokens()
    changed = x.clone()
    changed[:, 2] += 1
    moved = (module(changed, Grid(10)) - module(x, Grid(10))).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [False, False, True, True, True, True, False, False, False, False]


def test_parameters():
    count = {v: sum(p.numel() for p in layer(v).parameters()) for v in VARIANTS}
    linear = 6 * 6 + 6
    assert count == {
        "she": 10 * 36 + 2 * linear,
        "he": 10 * 6 + 3 * linear,
        "we": 10 + 3 * linear,
        "me": 10,
    }


@each
def test_forms_agree_in_single_precision(variant):
    torch.manual_seed(0)
    x = torch.randn(2, 100, 8)
    direct, fft = (Extractor(dim=8, length=100, variant=variant, form=form) for form in ("direct", "fft"))
    fft.load_state_dict(direct.state_dict())
    truth = direct.double()(x.double(), Grid(100))
    assert (fft(x, Grid(100)) - truth).abs().max() < 1e-5 * truth.abs().max()


def test_it_says_that_it_is_a_reconstruction_and_refuses_what_it_cannot():
    assert get_system("extractors").fidelity == "reconstruction"
    assert "reconstruction" in get_system("extractors").doc
    with pytest.raises(ArgumentError, match="variant"):
        Extractor(dim=4, length=4, variant="xe")
    with pytest.raises(ArgumentError, match="length"):
        Extractor(dim=4, length=0)
    with pytest.raises(ArgumentError, match="past"):
        layer().prefill(tokens(), Window(torch.zeros(2, 3, 6, dtype=torch.float64)))
    with pytest.raises(ArgumentError, match="form"):
        causal_fir(tokens(), torch.zeros(3).double(), form="slow")
