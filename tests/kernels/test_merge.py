from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.kernels.merge import merge, merge_shares


@given(cuts=st.lists(st.integers(0, 9), max_size=4))
def test_pieces_over_disjoint_keys_are_the_whole(cuts):
    q, k, v = (
        torch.randn(2, 3, 4, 5).double(),
        torch.randn(2, 3, 9, 5).double(),
        torch.randn(2, 3, 9, 2).double(),
    )
    bounds = [0, *sorted(cuts), 9]
    pieces = [attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in pairwise(bounds)]
    for got, want in zip(merge(*zip(*pieces, strict=True)), attend(q, k, v, return_lse=True), strict=True):
        torch.testing.assert_close(got, want)


def test_nested_merges_agree():
    outs, lses = torch.randn(3, 1, 2, 4, 5), torch.randn(3, 1, 2, 4)
    a = merge(outs[:2], lses[:2])
    nested = merge([a[0], outs[2]], [a[1], lses[2]])
    for x, y in zip(nested, merge(outs, lses), strict=True):
        torch.testing.assert_close(x, y)


def test_pieces_without_keys_add_nothing():
    out, lse = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3)
    none = torch.full_like(lse, float("-inf"))
    got, total = merge([out, torch.zeros_like(out)], [lse, none])
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(total, lse)
    got, total = merge([torch.zeros_like(out)] * 2, [none, none])
    assert (got == 0).all()
    assert (total == float("-inf")).all()


def test_gradients_are_exact_and_finite_without_keys():
    outs = torch.randn(2, 1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(2, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, s: merge(list(o), list(s)), (outs, lses))
    assert torch.autograd.gradgradcheck(lambda o, s: merge(list(o), list(s)), (outs, lses))
    hidden = lses.detach().clone()
    hidden[:, :, :, 1] = float("-inf")
    hidden[0, :, :, 2] = float("-inf")
    hidden.requires_grad_(True)
    out, lse = merge(list(outs), list(hidden))
    grads = torch.autograd.grad(out.sum() + lse[..., [0, 2]].sum(), (outs, hidden))
    assert all(torch.isfinite(g).all() for g in grads)


def test_half_precision_keeps_its_dtype():
    outs = [torch.randn(1, 1, 3, 2, dtype=torch.bfloat16) for _ in range(2)]
    out, lse = merge(outs, [torch.randn(1, 1, 3) for _ in range(2)])
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_without_lses_it_is_a_sum():
    outs = torch.randn(3, 1, 2, 4, 5)
    torch.testing.assert_close(merge(list(outs)), outs.sum(0))


def test_bad_arguments_are_named():
    a, b = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3)
    for outs, lses, message in (
        ([], None, r"^outs: .*at least one"),
        ([a, a[:, :, :2]], None, r"^outs\[1\]"),
        ([a, a], [b], r"^lses: "),
        ([a], [a], r"^lses\[0\]: .*return_lse"),
    ):
        with pytest.raises(ArgumentError, match=message):
            merge(outs, lses)


def test_shares_add_up_to_one_and_are_zero_where_nobody_has_a_key():
    lses = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    lses[:, 0, 1, 2] = float("-inf")
    lses[1, 1] = float("-inf")
    shares, lse = merge_shares(lses.unbind(0))
    torch.testing.assert_close(lse, lses.logsumexp(0))
    total = torch.ones_like(lse)
    total[0, 1, 2] = 0
    torch.testing.assert_close(shares.sum(0), total)
    assert (shares[1, 1] == 0).all()
    outs = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(merge(outs.unbind(0), lses.unbind(0))[0], (outs * shares[..., None]).sum(0))
