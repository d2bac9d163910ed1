"""TransNormerLLM's attention and layer: the equations, training equal to decoding, positions, padding, norm."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.flops import count_flops
from foveate.mechanisms.linear.transnormer_llm import SGLU, NormLinearAttention, TransNormerLayer
from foveate.mechanisms.norms import SimpleRMSNorm
from foveate.mechanisms.past import past_bytes


def randomised(module, dtype=torch.float64):
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def build(dim=12, heads=3, **options):
    return randomised(NormLinearAttention(dim=dim, heads=heads, **options))


def tokens(n=21, dim=12, b=2):
    return torch.randn(b, n, dim, dtype=torch.float64)


def plain(module, x):
    """The docstring's equations with every weight written out, the phases as a cosine of the distance."""
    heads, n = module.heads, x.shape[1]
    q, k, v, u = (x @ w.mT for w in module.qkvu.weight.chunk(4))
    q, k = q * q.sigmoid(), k * k.sigmoid()
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if module.theta is None:
        scores = q @ k.mT
    else:
        phase = (module.theta.unsqueeze(1) * distance[None, :, :, None]).cos()
        scores = (q.unsqueeze(3) * k.unsqueeze(2) * phase).sum(-1)
    weights = torch.exp(-module.slopes.view(-1, 1, 1) * distance).tril()
    o = ((scores * weights) @ v).transpose(1, 2).flatten(2)
    o = o / (o.square().mean(-1, keepdim=True).sqrt() + 1e-8)
    return (u * o) @ module.proj.weight.mT


@pytest.mark.parametrize("lrpe", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_attention_is_the_quadratic_form_with_cosines_of_distances(lrpe, chunk):
    module = build(width=18, lrpe=lrpe, layer=1, layers=4, chunk=chunk)
    x = tokens()
    torch.testing.assert_close(module(x, Grid(21)), plain(module, x))


@pytest.mark.parametrize("lrpe", [True, False])
def test_training_in_blocks_and_step_by_step_are_equal(lrpe):
    module, x = build(lrpe=lrpe), tokens(300)
    whole = plain(module, x)
    torch.testing.assert_close(module(x, Grid(300)), whole)
    # Positions go on counting where the past ended, in blocks as in steps.
    out, past = module.prefill(x[:, :256])
    second, past = module.prefill(x[:, 256:290], past)
    torch.testing.assert_close(torch.cat([out, second], 1), whole[:, :290])
    size = past_bytes(past)
    for t in range(290, 300):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])
    assert past.length == 300
    assert past_bytes(past) == size == 2 * 3 * (8 if lrpe else 4) * 4 * 8


def test_two_sequences_can_be_decoded_by_turns():
    # The authors keep the position in the module, which then has to be reset for every sequence.
    module, (one, two) = build(lrpe=True), (tokens(8), tokens(8))
    expected = [module(x, Grid(8)) for x in (one, two)]
    pasts, outs = [None, None], [[], []]
    for t in range(8):
        for i, x in enumerate((one, two)):
            out, pasts[i] = module.step(x[:, t], pasts[i])
            outs[i].append(out)
    for got, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(torch.stack(got, 1), want)
    assert "offset" not in module.state_dict()


def test_one_token_gives_its_own_value():
    module, x = build(), tokens(1)
    q, k, v, u = (x @ w.mT for w in module.qkvu.weight.chunk(4))
    q, k = q * q.sigmoid(), k * k.sigmoid()
    products = (q * k).unflatten(-1, (3, 4)).sum(-1, keepdim=True) * v.unflatten(-1, (3, 4))
    expected = (u * module.norm(products.flatten(2))) @ module.proj.weight.mT
    torch.testing.assert_close(module(x, Grid(1)), expected)
    # At distance 0 the phase is 1: encoding changes nothing.
    encoded = build(lrpe=True)
    encoded.load_state_dict(module.state_dict() | {"theta": encoded.theta.data})
    torch.testing.assert_close(encoded(x, Grid(1)), expected)


def test_theta_begins_as_published():
    theta = NormLinearAttention(dim=12, heads=3, lrpe=True).theta
    assert theta.shape == (3, 1, 4)
    torch.testing.assert_close(theta.flatten(), 10000.0 ** (-2 * torch.arange(12) / 12))
    assert NormLinearAttention(dim=12, heads=3).theta is None


def test_nobody_sees_padding():
    module, x = build(lrpe=True), tokens(10)
    present = torch.ones(2, 10, dtype=torch.bool)
    present[1, :4] = False
    out, past = module.prefill(x, present=present)
    changed = x.clone()
    changed[1, :4] = torch.randn(4, 12)
    again, other = module.prefill(changed, present=present)
    torch.testing.assert_close(again[1, 4:], out[1, 4:])
    torch.testing.assert_close(other.sums, past.sums)
    # Only distances count: what is padded on the left computes what is not padded.
    alone, _ = module.prefill(x[1:, 4:])
    torch.testing.assert_close(out[1:, 4:], alone)
    assert torch.equal(module(x, Grid(10))[0], out[0])
    x = x.requires_grad_()
    module.prefill(x, present=present)[0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("present", [torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 10)])
def test_wrong_padding_is_named(present):
    with pytest.raises(ArgumentError, match=r"^present: expected bool of shape \(2, 10\)"):
        build().prefill(tokens(10), present=present)


def test_the_norm_forgets_scale_and_keeps_zero():
    norm, x = SimpleRMSNorm(12), tokens()
    torch.testing.assert_close(norm(x * 37.0), norm(x))
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (12,), eps=1e-30))
    zeros = torch.zeros(2, 12, requires_grad=True)
    norm(zeros).sum().backward()
    assert not norm(zeros).any()
    assert zeros.grad.isfinite().all()
    assert not list(norm.parameters())
    # Squares of these would overflow half precision.
    assert norm(torch.full((1, 12), 3e4, dtype=torch.float16)).tolist() == [[1.0] * 12]


def test_the_layer_is_two_residual_branches():
    layer = randomised(TransNormerLayer(dim=12, heads=3, hidden=20, lrpe=True, layers=2))
    x = tokens()
    norm = lambda y: y / (y.square().mean(-1, keepdim=True).sqrt() + 1e-8)  # noqa: E731
    middle = x + plain(layer.mixer, norm(x))
    y = norm(middle)
    mlp = layer.mlp
    expected = middle + (y @ mlp.l1.weight.mT * (y @ mlp.l2.weight.mT)) @ mlp.l3.weight.mT
    torch.testing.assert_close(layer(x, Grid(3, 7)), expected)
    out, past = layer.prefill(x[:, :15])
    for t in range(15, 21):
        out, past = layer.step(x[:, t], past)
        torch.testing.assert_close(out, expected[:, t])
    names = {name for name, _ in layer.named_parameters()}
    assert names == {
        *("mixer.qkvu.weight", "mixer.theta", "mixer.proj.weight"),
        *("mlp.l1.weight", "mlp.l2.weight", "mlp.l3.weight"),
    }


def test_a_unit_without_activation_is_homogeneous_of_degree_two():
    unit, x = SGLU(6, 10).double(), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(unit(3 * x), 9 * unit(x))


def test_a_network_of_one_layer_has_slopes():
    # The authors divide by layers - 1.
    assert build(heads=4, layers=1).slopes.isfinite().all()


def test_a_token_costs_the_same_at_every_length():
    module = NormLinearAttention(dim=32, heads=2, lrpe=True)
    x = torch.randn(1, 2048, 32)
    with torch.no_grad():
        assert count_flops(module, x, Grid(2048)) == 8 * count_flops(module, x[:, :256], Grid(256))
