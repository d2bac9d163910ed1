"""GAAM: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.scored.gaussian_adaptive_attention import (
    GaussianAdaptiveAttention,
    GaussianBlock,
    GaussianHeads,
    importance,
)


def gate(axis=1, heads=3, gaussians=4, offsets=0.3, **options):
    module = GaussianHeads(axis=axis, heads=heads, gaussians=gaussians, **options).double()
    nn.init.normal_(module.offsets, std=offsets) if offsets else nn.init.zeros_(module.offsets)
    return module


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("official", [False, True])
def test_weights_of_every_chunk_sum_to_one(official):
    module = gate(official=official, gaussians=2)
    nn.init.ones_(module.widths)
    w = module.weights(data(2, 11, 5))
    for chunk in w.split([3, 3, 5], dim=1):
        torch.testing.assert_close(chunk.sum(1), torch.ones(2, 5, dtype=torch.float64))


def test_weights_do_not_vanish_far_from_all_gaussians_as_the_authors_do():
    x = data(1, 6, 2)
    ours, theirs = (gate(heads=1, offsets=0, official=official) for official in (False, True))
    for module in (ours, theirs):
        nn.init.constant_(module.widths, 0.01)
    torch.testing.assert_close(ours.weights(x).sum(1), torch.ones(1, 2, dtype=torch.float64))
    assert theirs.weights(x).sum(1).max() < 0.5


def test_without_offsets_scale_and_shift_of_the_input_change_nothing():
    x = data(2, 9, 4)
    module = gate(offsets=0, eps=1e-300)
    torch.testing.assert_close(module.weights(3 * x + 7), module.weights(x))
    # Offsets are in units of x, not of its deviation.
    assert not torch.allclose(gate(offsets=1.0, eps=1e-300).weights(3 * x), gate(offsets=1.0).weights(x))


def test_wide_gaussians_are_uniform():
    x = data(2, 12, 4)
    module = gate()
    nn.init.constant_(module.widths, 1e6)
    torch.testing.assert_close(module(x), x / 4)


def test_equal_gaussians_are_one_narrower_gaussian():
    x = data(2, 7, 4)
    many, one = gate(heads=1, gaussians=5, offsets=0), gate(heads=1, gaussians=1, offsets=0)
    nn.init.constant_(many.widths, 1.3)
    nn.init.constant_(one.widths, 1.3 / 5**0.5)
    torch.testing.assert_close(many.weights(x), one.weights(x))


def test_a_product_of_any_gaussians_is_one_gaussian():
    x = data(2, 7, 4)
    many, one = gate(heads=1, gaussians=5), gate(heads=1, gaussians=1)
    precision = many.widths.detach() ** -2
    with torch.no_grad():
        one.widths[0, 0] = precision.sum() ** -0.5
        one.offsets[0, 0] = (precision * many.offsets).sum() / precision.sum()
    torch.testing.assert_close(many.weights(x), one.weights(x))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_other_axes_may_be_permuted(axis):
    x, module = data(6, 6, 6), gate(axis)
    other = (axis + 1) % 3
    order = torch.randperm(6)
    torch.testing.assert_close(module(x.index_select(other, order)), module(x).index_select(other, order))


def test_padding_passes_and_counts_for_nothing():
    x = data(2, 8, 3)
    padded = torch.cat([x, torch.full((2, 4, 3), -9.0, dtype=torch.float64)], dim=1)
    module = gate(heads=1, padding=-9.0)
    torch.testing.assert_close(module(padded)[:, :8], module(x))
    assert module(padded)[:, 8:].eq(-9).all()
    # Theirs counts it in the variance and in the sum.
    theirs = gate(heads=1, padding=-9.0, official=True)
    assert not torch.allclose(theirs(padded)[:, :8], theirs(x))
    alone = torch.full((1, 4, 1), -9.0, dtype=torch.float64)
    assert module(alone).eq(-9).all()


def test_a_chunk_of_one_entry_keeps_it_where_the_authors_get_nan():
    x = data(2, 3, 4)
    torch.testing.assert_close(gate(heads=3)(x), x)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert gate(heads=3, official=True)(x).isnan().all()


def test_block_adds_its_input_layer_by_layer():
    x = data(2, 8, 6)
    block = GaussianBlock(axes=(1, 2), heads=(2, 3), gaussians=(3, 2)).double()
    first = block.layers[0](x) + x
    torch.testing.assert_close(block(x), block.layers[1](first) + first)


def test_work_grows_with_the_tokens_alone():
    from torch.utils.flop_counter import FlopCounterMode

    module = GaussianAdaptiveAttention(dim=8, heads=2)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, 64, 8), Grid(64))
    assert counter.get_total_flops() == 0  # no product of matrices at all


def test_importance_lies_between_0_and_1():
    found = importance(gate().weights(data(10, 9, 4)))
    assert found.shape == (9, 4)
    assert found.min() == 0
    assert found.max() == 1


def test_refuses_what_it_cannot():
    with pytest.raises(ArgumentError, match="grid"):
        GaussianAdaptiveAttention.for_workload(dim=8, grid=Grid(3), heads=4)
    with pytest.raises(ArgumentError, match="causal"):
        GaussianAdaptiveAttention.for_workload(dim=8, grid=Grid(8), heads=4, causal=True)
    with pytest.raises(ArgumentError, match=r"^x:"):
        gate(axis=3)(data(2, 8, 3))
    with pytest.raises(ArgumentError, match="gaussians"):
        GaussianBlock(gaussians=(1, 2))
    with pytest.raises(ArgumentError, match="over"):
        GaussianAdaptiveAttention(dim=8, over="heads")
