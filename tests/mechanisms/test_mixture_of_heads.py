"""MoH: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.select import watch_plans
from foveate.mechanisms.aggregated import AggregatedAttention, CosineAttention
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.mixture_of_heads import (
    MixtureOfAggregatedHeads,
    MixtureOfCosineHeads,
    MixtureOfHeads,
    NormRoutedHeads,
)
from foveate.patterns.basic import Causal


def layer(shared=2, routed=3, heads=8, dim=16, **options):
    return MixtureOfHeads(dim=dim, heads=heads, shared=shared, routed=routed, **options).double().eval()


def data(n=12, dim=16, batch=2):
    return torch.randn(batch, n, dim, dtype=torch.float64)


def every_head(module, x):
    """The outputs of all heads, none of them routed."""
    q, k, v = (split_heads(part, module.heads) for part in module.qkv(x).chunk(3, dim=-1))
    return attend(q, k, v, where=Causal() if module.causal else None, backend="reference")


@pytest.mark.parametrize(("shared", "routed"), [(0, 8), (3, 5), (1, 7), (8, 0)])
def test_an_undecided_router_of_all_heads_is_multi_head_attention(shared, routed):
    module, x = layer(shared, routed), data()
    for parameter in module.router.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module(x, Grid(12)), module.proj(merge_heads(every_head(module, x))))


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_are_not_computed_are_those_the_authors_multiply_by_zero(causal):
    module, x = layer(causal=causal, qkv_bias=True), data().requires_grad_()
    gates = module.router(x)
    dense = module.proj(merge_heads(every_head(module, x) * gates.gates.transpose(1, 2)[..., None]))
    ours = module(x, Grid(12))
    torch.testing.assert_close(ours, dense)
    leaves = (x, *module.parameters())
    got, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (ours, dense))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n", [64, 128, 256])
def test_only_chosen_pairs_are_computed(n):
    # Small problems may be faster dense: the planner is not asked here.
    module, x = layer(backend="tiles"), data(n)
    with watch_plans() as plans:
        module(x, Grid(n))
    chosen = module.router(x).chosen
    assert chosen.sum() == 2 * n * 3
    assert [plan.pairs_needed for plan in plans] == [2 * 2 * n * n, 2 * n * 3 * n]
    busiest = chosen.sum(1).max().item()
    assert plans[1].pairs_computed == 2 * 6 * busiest * n


def test_causal_heads_see_half_the_pairs():
    module, x = layer(causal=True), data(64)
    with watch_plans() as plans:
        module(x, Grid(64))
    seen = module.router(x).chosen * torch.arange(1, 65)[:, None]
    assert [plan.pairs_needed for plan in plans] == [2 * 2 * 64 * 65 // 2, seen.sum()]


def test_the_loss_rides_along_in_training_only():
    x = data()
    for training in (True, False):
        module = layer(loss_weight=0.5).train(training)
        module(x, Grid(12)).sum().mul(0).backward()
        grad = module.router.to_routed.weight.grad.clone()
        module.zero_grad()
        (0.5 * module.router(x).balance).backward()
        expected = module.router.to_routed.weight.grad
        torch.testing.assert_close(grad, expected if training else torch.zeros_like(grad))


def test_refuses_what_it_cannot():
    for shared, routed, name in ((9, 0, "shared"), (2, 7, "routed"), (2, 0, "routed"), (-1, 2, "shared")):
        with pytest.raises(ArgumentError, match=name):
            layer(shared, routed)
    with pytest.raises(ArgumentError, match="width"):
        NormRoutedHeads(dim=12, heads=4)
    with pytest.raises(ArgumentError, match="kv_heads"):
        NormRoutedHeads(dim=16, heads=4, kv_heads=3)


# ---- routed by the length of queries -------------------------------------------------------------------------------


def by_norm(heads=8, dim=32, **options):
    return NormRoutedHeads(dim=dim, heads=heads, **options).double().eval()


@pytest.mark.parametrize(("kv_heads", "shared"), [(8, 4), (4, 4), (4, 3), (2, 1)])
def test_the_longest_queries_are_taken_with_gates_of_one(kv_heads, shared):
    module, x = by_norm(kv_heads=kv_heads, shared=shared, routed=2), data(dim=32)
    q = split_heads(module.q_proj(x), 8)
    chosen, _ = module.choose(q)
    norms = q.norm(dim=-1).transpose(1, 2)[..., shared:]
    least = torch.where(chosen, norms, torch.inf).amin(-1)
    assert (least >= torch.where(chosen, 0.0, norms).amax(-1)).all()
    # All heads, then zeros: also in training, where all are computed.
    ones = torch.ones(*chosen.shape[:2], shared, dtype=torch.bool)
    every = by_norm(kv_heads=kv_heads, shared=8, routed=0)
    every.load_state_dict(module.state_dict())
    nn.init.eye_(every.proj.weight)
    heads = every(x, Grid(12)).unflatten(-1, (8, 4)) * torch.cat([ones, chosen], -1)[..., None]
    torch.testing.assert_close(module(x, Grid(12)), module.proj(heads.flatten(2)))
    torch.testing.assert_close(module.train()(x, Grid(12)), module.proj(heads.flatten(2)))


def test_straight_through_teaches_heads_that_were_not_taken():
    module, x = by_norm(), data(dim=32)
    chosen, _ = module.choose(split_heads(module.q_proj(x), 8))
    assert not chosen.all()
    gradients = []
    for training in (True, False):
        q = split_heads(module.q_proj(x), 8).detach().requires_grad_()
        module.train(training)
        hook = module.q_proj.register_forward_hook(lambda *_, q=q: merge_heads(q))
        module(x, Grid(12)).square().sum().backward()
        hook.remove()
        unchosen = ~chosen.transpose(1, 2)
        gradients.append(q.grad[:, 4:][unchosen].abs().max())
    assert gradients[0] > 0
    assert gradients[1] == 0


def test_decoding_step_by_step_is_the_whole():
    module, x = by_norm(kv_heads=4), data(9, 32)
    outs, past = [], None
    for part in (x[:, :4], x[:, 4:6]):
        out, past = module.prefill(part, past)
        outs.append(out)
    for t in range(6, 9):
        out, past = module.step(x[:, t], past)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), module(x, Grid(9)))


def test_queries_of_equal_length_are_no_nan():
    module = by_norm(bias=True)
    nn.init.zeros_(module.q_proj.weight)
    nn.init.ones_(module.q_proj.bias)
    assert module(data(dim=32), Grid(12)).isfinite().all()
    one = by_norm(shared=7, routed=1)
    assert one(data(dim=32), Grid(12)).isfinite().all()


# ---- in TransNeXt --------------------------------------------------------------------------------------------------


def hosts(shared, routed):
    options = {"dim": 16, "heads": 4}
    yield MixtureOfCosineHeads(**options, shared=shared, routed=routed), CosineAttention(**options)
    local = {**options, "window": 3, "pool": 2}
    yield MixtureOfAggregatedHeads(**local, shared=shared, routed=routed), AggregatedAttention(**local)


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_with_an_undecided_router_of_all_heads_are_the_hosts(index):
    ours, host = [module.double().eval() for module in list(hosts(1, 3))[index]]
    for parameter in ours.router.parameters():
        nn.init.zeros_(parameter)
    host.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("router")})
    x, grid = data(35), Grid(5, 7)
    torch.testing.assert_close(ours(x, grid), host(x, grid))


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_leave_out_heads_that_were_not_taken(index):
    module = list(hosts(1, 1))[index][0].double().eval()
    x, grid = data(35), Grid(5, 7)
    chosen = module.router(x).chosen
    out, full = module.mix(x, grid, None, chosen), module.mix(x, grid, None, None)
    ones = torch.ones(2, 35, 1, dtype=torch.bool)
    torch.testing.assert_close(out, full * torch.cat([ones, chosen], -1).transpose(1, 2)[..., None])
    with watch_plans() as plans:
        module(x, grid)
    shared, routed = (plan.pairs_needed for plan in plans)
    per_query = shared / (2 * 35)
    assert routed <= 2 * 35 * 49
    assert routed == pytest.approx(2 * 35 * per_query, rel=0.1)  # one of three heads


@pytest.mark.parametrize("index", [0, 1])
def test_hosts_learn_and_run_in_bfloat16(index):
    module = list(hosts(2, 1))[index][0]
    x = data(24).float().requires_grad_()
    module(x, Grid(4, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    module.to(torch.bfloat16)
    assert module(x.detach().bfloat16(), Grid(4, 6)).dtype == torch.bfloat16
