"""Lightning Attention-2: every statement of the paper's card about when it works, and its traps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.scan import scan
from foveate.mechanisms.decay import layer_slopes
from foveate.mechanisms.linear.lightning_attention_2 import LightningAttention2, lightning_attention_2


def draw(n=21, d=6, e=4, b=2, h=3, dtype=torch.float64):
    q, k, v = torch.randn(b, h, n, d), torch.randn(b, h, n, d), torch.randn(b, h, n, e)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.rand(h, 1, 1).to(dtype)


def quadratic(q, k, v, s):
    """O = ((Q K^T) * M) V with M_ij = exp(-s (i - j)) for i >= j: the decay starts at 0 on the diagonal."""
    i = torch.arange(q.shape[2])
    return ((q @ k.mT) * torch.exp(-s * (i[:, None] - i)).tril()) @ v


@given(n=st.sampled_from([1, 2, 63, 64, 65, 70, 128, 131]), e=st.integers(1, 9), chunk=st.integers(1, 80))
def test_equals_the_quadratic_form_for_any_block_size_and_any_length(n, e, chunk):
    q, k, v, s = draw(n=n, e=e)
    torch.testing.assert_close(lightning_attention_2(q, k, v, s, chunk=chunk), quadratic(q, k, v, s))


@pytest.mark.parametrize("n", [5, 70])
def test_gradients_equal_autograd_of_the_quadratic_form(n):
    leaves = [x.requires_grad_() for x in draw(n=n)]
    ours = torch.autograd.grad(lightning_attention_2(*leaves).sin().sum(), leaves)
    theirs = torch.autograd.grad(quadratic(*leaves).sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_error_in_single_precision_is_that_of_rounding():
    q, k, v, s = draw(n=200, d=32, e=32, dtype=torch.float32)
    got = lightning_attention_2(q, k, v, s).double()
    truth = quadratic(q.double(), k.double(), v.double(), s.double())
    plain = quadratic(q, k, v, s).double()
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_recurrent_form():
    q, k, v, s = draw()
    expected = lightning_attention_2(q, k, v, s)
    torch.testing.assert_close(lightning_attention_2(q, k, v, s, backend="recurrent"), expected)
    state, decay = torch.zeros(2, 3, 6, 4, dtype=q.dtype), torch.exp(-s)
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out = (q[:, :, t, None] @ state).squeeze(2)
        torch.testing.assert_close(out, expected[:, :, t])


def test_an_infinite_slope_leaves_each_token_to_itself():
    q, k, v, s = draw()
    own = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(lightning_attention_2(q, k, v, torch.full_like(s, math.inf)), own)
    torch.testing.assert_close(lightning_attention_2(q, k, v, torch.full_like(s, 1e4)), own)


def test_no_slope_is_plain_causal_linear_attention():
    q, k, v, s = draw()
    plain = (q @ k.mT).tril() @ v
    torch.testing.assert_close(lightning_attention_2(q, k, v), plain)
    torch.testing.assert_close(lightning_attention_2(q, k, v, torch.zeros_like(s)), plain)


def test_slopes_per_head_in_either_shape():
    q, k, v, s = draw()
    assert torch.equal(lightning_attention_2(q, k, v, s.flatten()), lightning_attention_2(q, k, v, s))


def test_flash_linear_attentions_name_for_it():
    q, k, v, s = draw()
    gates = (-s).view(1, -1, 1).expand(2, -1, q.shape[2])
    torch.testing.assert_close(scan(q, k, v, decay=gates, scale=1.0), lightning_attention_2(q, k, v, s))


def test_a_prefix_and_its_continuation_equal_the_whole():
    q, k, v, s = draw(n=100)
    whole, last = lightning_attention_2(q, k, v, s, return_state=True)
    first, state = lightning_attention_2(*(x[:, :, :37] for x in (q, k, v)), s, return_state=True)
    second, final = lightning_attention_2(
        *(x[:, :, 37:] for x in (q, k, v)), s, initial_state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(final, last)


def test_without_decay_outputs_grow_with_the_sequence_and_the_norm_stops_it():
    q, k, v, _ = draw(n=4096, d=8, e=8, h=1)
    out = lightning_attention_2(q.abs(), k.abs(), v + 1)
    assert out[:, :, -64:].square().mean() > 100 * out[:, :, 32:96].square().mean()
    module = LightningAttention2(dim=16, heads=2, decay=False)
    with torch.no_grad():
        y = module(torch.randn(1, 4096, 16) + 1, Grid(4096))
    assert y[:, -64:].square().mean() < 3 * y[:, 32:96].square().mean()


@pytest.mark.parametrize("decay", [True, False])
def test_module_is_the_equation_of_its_docstring(decay):
    module = LightningAttention2(dim=12, heads=3, decay=decay, layer=1, layers=4).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    q, k, v = (x @ w.mT for w in module.qkv.weight.chunk(3))
    q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
    q, k = q * q.sigmoid(), k * k.sigmoid()
    s = module.slopes.view(3, 1, 1) if decay else torch.zeros(3, 1, 1)
    out = quadratic(q, k, v, s).transpose(1, 2).flatten(2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
    torch.testing.assert_close(module(x, Grid(4, 5)), out @ module.proj.weight.mT)
    assert {name for name, _ in module.named_parameters()} == {"qkv.weight", "norm.weight", "proj.weight"}


def test_prefill_and_steps_equal_the_forward_pass():
    module = LightningAttention2(dim=8, heads=2).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    whole = module(x, Grid(30))
    out, past = module.prefill(x[:, :20])
    torch.testing.assert_close(out, whole[:, :20])
    for t in range(20, 30):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])
    assert past.sums.shape == (2, 2, 4, 4)
    assert past.length == 30


def test_slopes_are_alibis_and_fade_over_the_layers():
    torch.testing.assert_close(layer_slopes(8), 2.0 ** -torch.arange(1.0, 9) * (1 + 1e-5))
    torch.testing.assert_close(layer_slopes(8, 2, 5), 2.0 ** -torch.arange(1.0, 9) * (0.5 + 1e-5))
    # The last layer hardly forgets at all.
    torch.testing.assert_close(layer_slopes(4, 11, 12), layer_slopes(4) * 1e-5, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (torch.zeros(2), r"^slopes: expected \(3,\) or \(3, 1, 1\)"),
        (torch.zeros(1, 3), r"^slopes: expected \(3,\) or \(3, 1, 1\)"),
        (torch.tensor([0.0, -0.5, 1.0]), r"^slopes: expected numbers >= 0, got -0\.5"),
    ],
)
def test_wrong_slopes_are_named(s, message):
    q, k, v, _ = draw(dtype=torch.float32)
    with pytest.raises(ArgumentError, match=message):
        lightning_attention_2(q, k, v, s)


def test_layers_outside_the_network_are_named():
    with pytest.raises(ArgumentError, match=r"^layer: expected an index into layers=3, got 3"):
        LightningAttention2(dim=8, heads=2, layer=3, layers=3)
