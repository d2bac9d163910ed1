"""Merging by significance: what is merged with what, and by which weights."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing.significance import SignificanceMerge, shares_of


def merge(rates, mean=True):
    module = SignificanceMerge(rates).double()
    with torch.no_grad():
        for level in module.levels:
            if mean:
                level.weight.fill_(1 / level.in_features)
                level.bias.zero_()
    return module


def test_shares_are_the_published_ones():
    assert shares_of(3136, 3) == [784, 1568, 784]
    assert shares_of(48, 2) == [24, 24]
    assert shares_of(5, 1) == [5]
    assert sum(shares_of(7, 3)) == 7


def test_published_lengths():
    assert merge((196, 56, 28)).length(56 * 56) == 4 + 28 + 28
    assert merge((49, 14, 7)).length(28 * 28) == 4 + 28 + 28
    assert merge((2, 1)).length(14 * 14) == 49 + 98


@pytest.mark.parametrize("n", [24, 23, 5, 3, 1])
@pytest.mark.parametrize("rates", [(4, 3, 2), (2, 1), (5,)])
def test_equal_weights_are_means_of_consecutive_sorted_tokens(n, rates):
    x, significance = torch.randn(2, n, 4, dtype=torch.float64), torch.rand(2, n)
    out = merge(rates)(x, significance)
    assert out.shape[1] == merge(rates).length(n)
    for b in range(2):
        rows, groups = x[b, significance[b].argsort()], []
        for part, rate in zip(rows.split(shares_of(n, len(rates))), rates, strict=True):
            groups += [piece.mean(0) for piece in part.split(rate) if len(piece)]
        torch.testing.assert_close(out[b], torch.stack(groups))


def test_the_least_significant_come_first_and_are_merged_most():
    x = torch.arange(16.0, dtype=torch.float64)[None, :, None]
    out = merge((4, 2, 1))(x, -x[..., 0])
    assert out.flatten().tolist() == [13.5, 10.5, 8.5, 6.5, 4.5, 3, 2, 1, 0]


def test_ties_stay_in_order_so_that_permuting_them_changes_the_merging():
    module, x = merge((2, 2), mean=False), torch.randn(1, 8, 3, dtype=torch.float64)
    flat, moved = torch.zeros(1, 8), torch.randperm(8)
    assert not torch.allclose(module(x, flat), module(x[:, moved], flat))
    told_apart = torch.rand(1, 8)
    torch.testing.assert_close(module(x, told_apart), module(x[:, moved], told_apart[:, moved]))


def test_no_gradient_goes_to_the_significance():
    module, s = merge((2, 1), mean=False), torch.rand(1, 8, requires_grad=True)
    x = torch.randn(1, 8, 3, dtype=torch.float64, requires_grad=True)
    module(x, s).square().sum().backward()
    assert s.grad is None
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("rates", [(), (1, 2, 3, 4), (0, 1), (2.5,)])
def test_bad_rates_are_named(rates):
    with pytest.raises(ArgumentError, match="rates"):
        SignificanceMerge(rates)
    with pytest.raises(ArgumentError, match="levels"):
        shares_of(8, 4)
