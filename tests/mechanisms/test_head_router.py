"""Routers of heads: sums of gates, the loss, and attention with some heads."""

import pytest
import torch
from torch import nn

from foveate.kernels.attend import attend
from foveate.mechanisms.head_router import HeadRouter, attend_chosen


def router(shared, routed, heads=8, dim=16):
    return HeadRouter(dim, heads, shared=shared, routed=routed).double()


def data(n=10, dim=16):
    return torch.randn(2, n, dim, dtype=torch.float64)


@pytest.mark.parametrize(("shared", "routed"), [(3, 2), (1, 4), (0, 3), (8, 0), (1, 7)])
def test_gates_sum_to_the_numbers_of_heads(shared, routed):
    module, x = router(shared, routed), data()
    gates, chosen, _ = module(x)
    assert gates.shape == (2, 10, 8)
    assert chosen.shape == (2, 10, 8 - shared)
    both = shared and routed
    a = module.to_balance(x).softmax(-1) * 2 if both else torch.ones(2, 10, 2, dtype=torch.float64)
    torch.testing.assert_close(gates[..., :shared].sum(-1), shared * a[..., 0])
    torch.testing.assert_close(gates[..., shared:].sum(-1), routed * a[..., 1])
    assert gates[..., shared:][~chosen].eq(0).all()
    if routed:
        assert chosen.sum(-1).eq(routed).all()


def test_the_loss_is_the_number_of_routed_heads_when_all_are_used_alike():
    module, x = router(2, 3), data(12)
    nn.init.zeros_(module.to_routed.weight)
    torch.testing.assert_close(module(x).balance, torch.tensor(3.0, dtype=torch.float64))
    # Each token likes another head: used alike again.
    module = router(0, 1, heads=4, dim=4)
    nn.init.eye_(module.to_routed.weight)
    cycle = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1) * 5
    torch.testing.assert_close(module(cycle).balance, torch.tensor(1.0, dtype=torch.float64))
    # All like the same head.
    assert module(cycle[:, :1].expand(-1, 12, -1)).balance > 3


def test_the_choice_has_no_gradient_and_the_gates_have():
    module, x = router(2, 3), data()
    module(x).gates[..., 2:].square().sum().backward()
    assert module.to_routed.weight.grad.abs().max() > 0
    assert not module(x).chosen.requires_grad


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("shared", [0, 3, 8])
def test_grouped_key_heads_are_those_of_their_queries(kv_heads, shared):
    q = torch.randn(2, 8, 10, 4, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 10, 4, dtype=torch.float64) for _ in range(2))
    chosen = torch.rand(2, 10, 8 - shared) < 0.5
    every = torch.cat([torch.ones(2, 10, shared, dtype=torch.bool), chosen], -1).transpose(1, 2)
    torch.testing.assert_close(attend_chosen(q, k, v, chosen), attend(q, k, v) * every[..., None])
