"""Infinite self-attention: what its equations promise."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import split_heads
from foveate.mechanisms.scored.infinite_self_attention import InfiniteSelfAttention, principal, walks
from foveate.scores.rules import ReLU


def layer(**options):
    return InfiniteSelfAttention(dim=16, heads=2, **options).double()


def tokens(n=11, batch=2):
    return torch.randn(batch, n, 16, dtype=torch.float64)


def matrices(module, x):
    """W of one hop, written out."""
    q, k = (split_heads(part(x), 2) for part in (module.q_proj, module.k_proj))
    affinity = (q @ k.mT / 8).relu()
    return module.rho * affinity / (affinity.norm(dim=(-2, -1), keepdim=True) + 1e-6)


def test_weights_equal_the_equation_and_have_the_norm_rho():
    module, x = layer(rho=0.8), tokens()
    weights = module.weights(x, x)
    torch.testing.assert_close(weights, matrices(module, x))
    assert (weights >= 0).all()
    norms = torch.linalg.matrix_norm(weights)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.8), rtol=1e-5, atol=0)


def test_output_is_weights_times_values():
    module, x = layer(), tokens()
    v = split_heads(module.v_proj(x), 2)
    expected = module.out_proj((matrices(module, x) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, Grid(11)), expected)


def test_keys_as_values_give_the_norm():
    q, k = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    read = attend(q, k, k, weigh=ReLU(), scale=1 / 8)
    expected = (q @ k.mT / 8).relu().square().sum((-2, -1))
    torch.testing.assert_close((q * read).sum((-2, -1)) / 8, expected)


def test_keys_may_be_another_sequence():
    module = layer()
    out = module.read(tokens(5), tokens(9), tokens(9))
    assert out.shape == (2, 5, 16)
    assert module.weights(tokens(5), tokens(9)).shape == (2, 2, 5, 9)
    with pytest.raises(ArgumentError, match=r"^value"):
        module.read(tokens(5), tokens(9), tokens(8))
    with pytest.raises(ArgumentError, match=r"^query"):
        module.read(tokens(5)[..., :8], tokens(9), tokens(9))
    with pytest.raises(ArgumentError, match=r"^key"):
        layer(hops=2).read(tokens(5), tokens(9), tokens(9))


def test_the_series_converges_to_the_limit_within_its_bound():
    module, x = layer(rho=0.9), tokens()
    weights = matrices(module, x)
    v = split_heads(module.v_proj(x), 2)
    limit = (torch.linalg.inv(torch.eye(11) - weights) - torch.eye(11)) @ v
    torch.testing.assert_close(walks(weights) @ v, limit)
    size, norm = v.norm(dim=(-2, -1)), torch.linalg.matrix_norm(weights, 2)
    errors = []
    for hops in (1, 2, 4, 8):
        partial = layer(rho=0.9, hops=hops)
        partial.load_state_dict(module.state_dict())
        total = sum(torch.linalg.matrix_power(weights, t) for t in range(1, hops + 1)) @ v
        expected = partial.out_proj(total.transpose(1, 2).flatten(2))
        torch.testing.assert_close(partial(x, Grid(11)), expected)
        error = (total - limit).norm(dim=(-2, -1))
        assert (error <= norm ** (hops + 1) / (1 - norm) * size + 1e-12).all()
        errors.append(error.max().item())
    assert errors == sorted(errors, reverse=True)
    whole = layer(rho=0.9, hops=None)
    whole.load_state_dict(module.state_dict())
    expected = whole.out_proj(limit.transpose(1, 2).flatten(2))
    torch.testing.assert_close(whole(x, Grid(11)), expected)


def test_rows_make_an_absorbing_chain():
    module, x = layer(rho=0.7, normalise="rows"), tokens()
    weights = module.weights(x, x)
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], 0.7), rtol=1e-4, atol=0)
    visits = walks(weights) + torch.eye(11)
    # A walk takes 1 / (1 - rho) steps on average, wherever it starts.
    torch.testing.assert_close(visits.sum(-1), torch.full_like(weights[..., 0], 1 / 0.3), rtol=1e-3, atol=0)


def test_linear_form_equals_its_equations_and_is_the_same_everywhere():
    module, x = layer(variant="linear"), tokens()
    q, k, v = (split_heads(part(x), 2) / 8**0.5 for part in (module.q_proj, module.k_proj, module.v_proj))
    energy = q.norm(dim=-1)
    mean = ((energy / (energy.sum(-1, keepdim=True) + 1e-6)).unsqueeze(-1) * q).sum(2, keepdim=True)
    a = (mean @ k.mT).relu()
    a = a / (a.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(module.weights(x, x), 0.95 * a.mT, rtol=1e-6, atol=1e-9)
    out = module(x, Grid(11))
    expected = module.out_proj((0.95 * a @ v * 8**0.5).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected.expand_as(out), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=1e-14)
    row = module.weights(x, x).mT.expand(-1, -1, 11, -1)
    assert (torch.linalg.matrix_rank(row) == 1).all()


@pytest.mark.parametrize("variant", ["pure", "linear"])
def test_permuting_tokens_permutes_the_output(variant):
    module, x = layer(variant=variant), tokens()
    order = torch.randperm(11)
    torch.testing.assert_close(module(x[:, order], Grid(11)), module(x, Grid(11))[:, order])


@pytest.mark.parametrize("variant", ["pure", "linear"])
def test_rho_learns_unless_official(variant):
    for official in (False, True):
        module = layer(variant=variant, official=official)
        module(tokens(), Grid(11)).square().sum().backward()
        grad = module.rho_logit.grad
        assert (grad is None) if official else (grad.abs() > 0)
    fixed = layer(variant=variant, rho=0.5, rho_trainable=False)
    assert "rho_logit" not in dict(fixed.named_parameters())
    assert fixed.rho.item() == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"hops": None}, {"normalise": "rows"}, {"variant": "linear"}])
def test_no_positive_affinity_gives_zeros_and_no_nan(options):
    module = layer(**options)
    with torch.no_grad():
        module.q_proj.weight.zero_()
        module.q_proj.bias.fill_(1.0)
        module.k_proj.weight.zero_()
        module.k_proj.bias.fill_(-1.0)
    x = tokens().requires_grad_()
    out = module(x, Grid(11))
    torch.testing.assert_close(out, module.out_proj(torch.zeros_like(x)))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *module.parameters()))


def test_dropout_acts_in_training_only_and_not_on_the_norm():
    module, x = layer(dropout=0.5), tokens()
    kept = module.weights(x, x)
    there = kept > 0
    torch.testing.assert_close(kept[there], 2 * matrices(module, x)[there])
    assert 0.3 < (there.sum() / (matrices(module, x) > 0).sum()).item() < 0.7
    assert not torch.equal(module(x, Grid(11)), module(x, Grid(11)))
    module.eval()
    assert torch.equal(module(x, Grid(11)), module(x, Grid(11)))


def test_the_principal_eigenvector_is_found():
    module, x = layer(variant="linear"), tokens(64)
    q, k = (split_heads(part(x), 2) for part in (module.q_proj, module.k_proj))
    affinity = (q @ k.mT / 8).relu()
    found = principal(affinity, steps=300)
    after = (found.unsqueeze(-2) @ affinity).squeeze(-2)
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), found, rtol=1e-6, atol=1e-9)


def test_cost_is_quadratic_in_the_pure_form_and_linear_in_the_other():
    counts = {}
    for variant in ("pure", "linear"):
        module = InfiniteSelfAttention(dim=16, heads=2, variant=variant)
        for n in (64, 128, 256):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(torch.randn(1, n, 16), Grid(n))
            counts[variant, n] = counter.get_total_flops() - 2 * 4 * n * 16 * 16
    assert counts["pure", 256] == 4 * counts["pure", 128] == 16 * counts["pure", 64]
    assert counts["linear", 256] == 2 * counts["linear", 128] == 4 * counts["linear", 64]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"variant": "cubic"}, "variant"),
        ({"variant": "linear", "hops": 2}, "variant"),
        ({"hops": 0}, "hops"),
        ({"rho": 1.0}, "rho"),
        ({"normalise": "columns"}, "normalise"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": 0.1, "hops": None}, "dropout"),
        ({"heads": 3}, "dim"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        InfiniteSelfAttention(**{"dim": 16, "heads": 2, **options})
