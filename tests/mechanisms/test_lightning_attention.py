"""Lightning attention in its TNL layer: the equation, its three forms, its slopes and its constant speed."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.flops import count_flops
from foveate.kernels.scan.watch import watch_scans
from foveate.mechanisms.linear.lightning_attention import LightningAttention
from foveate.mechanisms.past import past_bytes


def build(dim=12, heads=3, dtype=torch.float64, **options):
    module = LightningAttention(dim=dim, heads=heads, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def tokens(n=21, dim=12, b=2, dtype=torch.float64):
    return torch.randn(b, n, dim, dtype=dtype)


def plain(module, x, slopes):
    """The docstring's equation with every weight written out."""
    heads, n = module.heads, x.shape[1]
    q, k, v = (x @ w.mT for w in module.qkv.weight.chunk(3))
    q, k, v = (y * y.sigmoid() for y in (q, k, v))
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    i = torch.arange(n)
    weights = torch.exp(-slopes.view(-1, 1, 1) * (i[:, None] - i)).tril()
    o = ((q @ k.mT * weights) @ v).transpose(1, 2).flatten(2)
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    o = o * module.norm.weight + module.norm.bias
    gate = x @ module.gate[0].weight.mT @ module.gate[1].weight.mT
    return (o * gate.sigmoid()) @ module.proj.weight.mT


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("n", [1, 16, 21])
def test_equals_the_quadratic_form_for_any_block_size_and_any_length(n, chunk):
    module = build(layer=1, layers=4, chunk=chunk)
    x = tokens(n)
    torch.testing.assert_close(module(x, Grid(n)), plain(module, x, module.slopes))
    assert {name for name, _ in module.named_parameters()} == {
        *("qkv.weight", "norm.weight", "norm.bias", "gate.0.weight", "gate.1.weight", "proj.weight")
    }


@pytest.mark.parametrize("backend", ["recurrent", "reference"])
def test_the_other_forms_are_equal(backend):
    module, x = build(), tokens()
    expected = module(x, Grid(3, 7))
    module.backend = backend
    torch.testing.assert_close(module(x, Grid(3, 7)), expected)


def test_without_decay_it_is_plain_causal_linear_attention():
    module, x = build(decay=False), tokens()
    torch.testing.assert_close(module(x, Grid(21)), plain(module, x, torch.zeros(3)))
    # The last layer's factor of 1e-5 is almost that.
    last = build(decay=True, layer=3, layers=4)
    last.load_state_dict(module.state_dict())
    difference = (last(x, Grid(21)) - module(x, Grid(21))).abs().max()
    assert 0 < difference < 1e-3


def test_prefill_in_parts_and_steps_equal_the_forward_pass():
    module, x = build(), tokens(40)
    whole = module(x, Grid(40))
    out, past = module.prefill(x[:, :11])
    torch.testing.assert_close(out, whole[:, :11])
    out, past = module.prefill(x[:, 11:30], past)
    torch.testing.assert_close(out, whole[:, 11:30])
    size, kept = past_bytes(past), past.sums.clone()
    earlier = past
    for t in range(30, 40):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])
        assert past_bytes(past) == size
    assert past.length == 40
    assert torch.equal(earlier.sums, kept)


def test_no_token_sees_a_later_one():
    module, x = build(), tokens()
    changed = x.clone()
    changed[:, 9:] += 1
    a, b = module(x, Grid(21)), module(changed, Grid(21))
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.isclose(a[:, 9:], b[:, 9:]).all(-1).any()


def test_slopes_are_the_released_ones_also_for_heads_that_are_no_power_of_two():
    assert build(dim=12, heads=6).slopes.tolist() == pytest.approx(
        [s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8)]
    )
    assert build(heads=4, layer=1, layers=3).slopes.tolist() == pytest.approx(
        [s * (0.5 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)]
    )


@pytest.mark.parametrize("width", [1, 2, 8, 16, 24, 160])
def test_every_head_width_is_taken(width):
    # The authors' kernel refuses widths that divide 16 and splits those above 128.
    module = build(dim=2 * width, heads=2)
    x = tokens(dim=2 * width, n=6)
    torch.testing.assert_close(module(x, Grid(6)), plain(module, x, module.slopes))


def test_a_token_costs_the_same_at_every_length():
    module = build(dim=32, heads=2, dtype=torch.float32)
    with torch.no_grad():
        cost = [count_flops(module, tokens(n, 32, 1, torch.float32), Grid(n)) / n for n in (256, 1024, 4096)]
    assert cost[0] == cost[1] == cost[2]
    with watch_scans() as seen:
        module(tokens(256, 32, 1, torch.float32), Grid(256))
    projections = 2 * 32 * (3 * 32 + 2 * 16 + 32)
    assert cost[0] == projections + seen[0].flops / 256


def test_half_precision_errs_by_rounding_only():
    module, x = build(dim=32, heads=2), tokens(100, 32)
    truth = module(x, Grid(100))
    half = module.to(torch.bfloat16)
    error = (half(x.bfloat16(), Grid(100)).double() - truth).abs().max()
    assert error < 0.05 * truth.abs().max()


def test_layers_outside_the_network_are_named():
    with pytest.raises(ArgumentError, match=r"^layer: expected an index into layers=3, got 3"):
        LightningAttention(dim=8, heads=2, layer=3, layers=3)
