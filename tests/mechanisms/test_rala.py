"""Rank-augmented linear attention: what its equations promise."""

import pytest
import torch
from torch import nn
from torch.nn.functional import elu
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.scan import normalized_scan
from foveate.mechanisms.linear.rala import RALA, RALABlock, key_weights, rank_augmented
from foveate.scores.rotary import axial_angles


def heads(n=30, d=8, dtype=torch.float64):
    return (torch.randn(2, 3, n, d, dtype=dtype, requires_grad=True) for _ in range(3))


def turns(grid, d):
    angles = axial_angles(grid, d, inclusive=True, dtype=torch.float64)
    return angles.cos(), angles.sin()


def effective_rank(x):
    shares = torch.linalg.svdvals(x)
    shares = shares / shares.sum(-1, keepdim=True)
    return (-(shares * shares.clamp_min(1e-30).log()).sum(-1)).exp()


def bare(**options):
    """A layer without the convolution, the gate and the output projection."""
    module = RALA(dim=16, heads=2, **options).double()
    nn.init.normal_(module.qkvo.weight, std=0.3)
    for conv in (module.lepe, module.proj):
        nn.init.zeros_(conv.weight)
    with torch.no_grad():
        module.proj.weight += torch.eye(16)[:, :, None, None]
        module.qkvo.weight[48:] = 0
        module.qkvo.bias[48:] = 1
    return module


def test_equals_the_equations_written_out():
    q, k, v = heads()
    got = rank_augmented(q, k, v, turns=turns(Grid(5, 6), 8))
    fq, fk = elu(q) + 1, elu(k) + 1
    share = (8**-0.5 * fq.mean(2, keepdim=True) @ fk.mT).softmax(-1).mT
    fk = fk * share * 30
    cos, sin = (t.repeat_interleave(2, -1) for t in turns(Grid(5, 6), 8))

    def rope(x):
        return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2) * sin

    expected = rope(fq) @ (rope(fk).mT @ v / 30) / (fq @ fk.mean(2, keepdim=True).mT + 1e-6)
    torch.testing.assert_close(got, expected)


def test_rows_sum_to_one_without_turns():
    q, k, _ = heads()
    constant = torch.randn(1, 3, 1, 5, dtype=torch.float64).expand(2, 3, 30, 5)
    torch.testing.assert_close(rank_augmented(q, k, constant), constant, rtol=0, atol=1e-5)
    turned = rank_augmented(q, k, constant, turns=turns(Grid(5, 6), 8))
    assert not torch.allclose(turned, constant, atol=1e-3)


def test_one_pixel_returns_its_value():
    q, k, v = heads(n=1)
    torch.testing.assert_close(rank_augmented(q, k, v, turns=turns(Grid(1, 1), 8)), v, rtol=1e-5, atol=1e-5)


def test_key_weights_sum_to_the_number_of_keys_and_favour_the_mean_query():
    q, k, _ = heads()
    fq, fk = elu(q) + 1, elu(k) + 1
    weights = key_weights(fq, fk)
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], 30.0))
    best = (fq.mean(2, keepdim=True) @ fk.mT).argmax(-1)
    assert torch.equal(weights.argmax(-1, keepdim=True), best)


def test_equal_keys_for_the_mean_query_make_plain_linear_attention():
    q, k, v = heads()
    expected = normalized_scan(elu(q) + 1, elu(k) + 1, v, causal=False)
    torch.testing.assert_close(rank_augmented(q, k, v, augment=False), expected, rtol=1e-5, atol=1e-6)
    alike = k[:, :, :1].expand(-1, -1, 30, -1)  # all keys equal: weights are uniform
    torch.testing.assert_close(
        rank_augmented(q, alike, v), rank_augmented(q, alike, v, augment=False), rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(rank_augmented(q, k, v), expected, atol=1e-3)


def test_gate_of_one_and_no_convolution_leave_the_operator():
    module, x = bare(rotary=False), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    q, k, v, _ = module.qkvo(x).flatten(2).chunk(4, dim=1)
    q, k, v = (part.unflatten(1, (2, 8)).mT for part in (q, k, v))
    torch.testing.assert_close(module(x).flatten(2).unflatten(1, (2, 8)).mT, rank_augmented(q, k, v))


def test_turns_raise_the_effective_rank_of_the_map():
    q, k, _ = heads(n=64, d=16)
    unit = torch.eye(64, dtype=torch.float64).expand(2, 3, 64, 64)
    plain = rank_augmented(q, k, unit, augment=False)
    ours = rank_augmented(q, k, unit, turns=turns(Grid(8, 8), 16))
    assert effective_rank(ours).mean() > 1.1 * effective_rank(plain).mean()


def test_the_gate_raises_the_rank_of_what_comes_out():
    module, x = bare(rotary=False), torch.randn(1, 16, 5, 6, dtype=torch.float64)
    with torch.no_grad():  # equal values: the sum is of rank one per head, whatever the weights are
        module.qkvo.weight[32:48] = 0
        module.qkvo.bias[32:48] = 1
        assert torch.linalg.matrix_rank(module(x).flatten(2), tol=1e-4).item() == 1
        module.qkvo.weight[48:].normal_(generator=torch.Generator().manual_seed(0))
        assert torch.linalg.matrix_rank(module(x).flatten(2), tol=1e-4).item() == 16


def test_softmax_form_is_attention_over_turned_queries_and_keys():
    module, x = bare(form="softmax", rotary=False), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    q, k, v, _ = module.qkvo(x).flatten(2).chunk(4, dim=1)
    q, k, v = (part.unflatten(1, (2, 8)).mT for part in (q, k, v))
    torch.testing.assert_close(module(x).flatten(2).unflatten(1, (2, 8)).mT, attend(q, k, v))
    turned = RALA(dim=16, heads=2, form="softmax").double()
    turned.load_state_dict(module.state_dict())
    assert not torch.allclose(turned(x), module(x), atol=1e-4)


def test_cost_grows_linearly_with_the_map_and_quadratically_in_the_softmax_form():
    counts = {}
    for form in ("linear", "softmax"):
        for side in (8, 16, 32):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                RALA(dim=16, heads=2, form=form)(torch.randn(1, 16, side, side))
            counts[form, side] = counter.get_total_flops() / side**2
    assert counts["linear", 8] == counts["linear", 16] == counts["linear", 32]
    assert counts["softmax", 32] > 2 * counts["softmax", 16]


def test_block_keeps_shape_and_scales_its_branches():
    block = RALABlock(dim=16, heads=2, hidden=24, layer_scale=0.0)
    x = torch.randn(1, 16, 3, 7)
    torch.testing.assert_close(block(x), x + block.pos(x))
    assert RALABlock(dim=16, heads=2, hidden=24, form="softmax")(x).shape == x.shape


@pytest.mark.parametrize(
    ("options", "name"),
    [({"heads": 8}, "heads"), ({"form": "cosine"}, "form"), ({"kernel": 4}, "kernel"), ({"dim": 17}, "dim")],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        RALA(**{"dim": 16, "heads": 2, **options})
