"""Superlinear attention: what its equations promise."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.routed.superlinear_attention import (
    SuperlinearAttention,
    attend_spans,
    superlinear_attention,
)
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.routing.spans import Stripe, search_spans, select_spans

NEAR = Stripe(index=1)


def draw(n=50, h=2, h_kv=2, d=8, n_q=None, dtype=torch.float64):
    q1, q2 = (torch.randn(2, h, n_q or n, d, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, h_kv, n, d, dtype=dtype) for _ in range(2))
    return q1, q2, k, v


@pytest.mark.parametrize(("n", "n_q"), [(15, 15), (9, 9), (15, 4), (1, 1)])
def test_a_window_over_everything_is_causal_attention_for_any_routing(n, n_q):
    q1, q2, k, v = draw(n, 4, 2, n_q=n_q)
    out = superlinear_attention(q1, q2, k, v, Stripe(index=3))
    torch.testing.assert_close(out, attend(q2, k, v, where=Causal()))


@pytest.mark.parametrize(
    "stripe", [NEAR, Stripe(index=0, forward=1.0), Stripe(index=1, search_power=0.55)], ids=str
)
@pytest.mark.parametrize("n_q", [50, 6])
@pytest.mark.parametrize("spans", [1, 3])
def test_it_is_the_gated_sum_of_joint_softmaxes(stripe, n_q, spans):
    q1, q2, k, v = draw(50, 4, 2, n_q=n_q)
    found = search_spans(q1, k, stripe, spans=spans)
    keys = torch.arange(50)
    near = (
        SlidingWindow(stripe.window - 1).dense(n_q, 50)
        if stripe.window
        else torch.zeros(n_q, 50, dtype=torch.bool)
    )
    expected = torch.zeros_like(q2)
    for j in range(spans):
        start, end = found.start[..., j, None], found.end[..., j, None]
        mask = near | ((keys >= start) & (keys <= end) & (start >= 0))
        expected = expected + found.gates()[..., j, None] * attend(q2, k, v, mask=mask)
    out = superlinear_attention(q1, q2, k, v, stripe, spans=spans)
    torch.testing.assert_close(out, expected)


def test_gradients_flow_through_gates_and_spans_only():
    q1, q2, k, v = (x.requires_grad_() for x in draw(50))
    out = superlinear_attention(q1, q2, k, v, NEAR)
    given = torch.autograd.grad(out.square().sum(), (q1, q2, k, v))
    assert all(g.abs().sum() > 0 for g in given)
    # The same with the choice frozen: positions carry no gradient of their own.
    found = search_spans(q1, k, NEAR, spans=2)
    frozen = found._replace(start=found.start.clone(), end=found.end.clone())
    again = torch.autograd.grad(attend_spans(q2, k, v, frozen, NEAR).square().sum(), (q1, q2, k, v))
    for a, b in zip(given, again, strict=True):
        torch.testing.assert_close(a, b)
    # Without a gate to learn from, the routing queries get nothing; nor where one span or none is left.
    fixed = search_spans(q1.detach(), k.detach(), NEAR, spans=2)
    attend_spans(q2, k, v, fixed, NEAR).square().sum().backward()
    assert q1.grad is None
    assert given[0][:, :, :8].eq(0).all()


def test_padding_is_seen_by_nobody():
    q1, q2, k, v = draw(40)
    present = torch.ones(2, 40, dtype=torch.bool)
    present[:, :7] = False
    out = superlinear_attention(q1, q2, k, v, NEAR, present=present)
    cut = superlinear_attention(*(x[:, :, 7:] for x in (q1, q2, k, v)), NEAR)
    # Left padding changes nothing: positions count from the first token that is there.
    torch.testing.assert_close(out[:, :, 7:], cut)
    assert out[:, :, :7].eq(0).all()


@pytest.mark.parametrize("forward", [0.0, 1.0])
def test_prefill_and_steps_equal_the_forward_pass(forward):
    module = SuperlinearAttention(dim=16, heads=4, kv_heads=2, index=1, forward=forward).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    whole = module(x, Grid(40))
    out, past = module.prefill(x[:, :2])
    torch.testing.assert_close(out, whole[:, :2])
    out, past = module.prefill(x[:, 2:30], past)
    torch.testing.assert_close(out, whole[:, 2:30])
    for t in range(30, 40):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])


@pytest.mark.parametrize("at", [3, 700, 1400])
def test_a_needle_near_an_anchor_is_found(at):
    n = 2048
    q1, q2, k, v = draw(n, 1, 1, 16, n_q=1, dtype=torch.float32)
    k, q1 = k * 0.3, q1 * 3
    # The routing key of the anchor behind the needle points to it, the needle itself is what q2 looks for.
    ahead = min(a for d in Stripe(index=1).distances(n) if (a := n - d) >= at)
    k[:, :, ahead] = q1[:, :, 0]
    k[:, :, at] = 20 * q2[:, :, 0] / q2[:, :, 0].norm(dim=-1, keepdim=True) + (
        q1[:, :, 0] if at == ahead else 0
    )
    out = superlinear_attention(q1, q2, k, v, NEAR, spans=1)
    torch.testing.assert_close(out[:, :, 0], v[:, :, at], rtol=0.02, atol=0.02)


def test_attention_grows_like_the_power_three_halves():
    needed = []
    for n in (512, 2048, 8192):
        q = torch.randn(1, 1, n, 8)
        where = select_spans(search_spans(q, q, NEAR, spans=2), n, NEAR)
        needed.append(explain((1, 2, n, 8), (1, 1, n, 8), (1, 1, n, 8), where=where).pairs_needed)
    for a, b in pairwise(needed):
        assert math.log(b / a, 4) == pytest.approx(1.5, abs=0.1)


class Seeker(nn.Module):
    """Looks for a value that stands somewhere far back; the routing query is all that says where."""

    def __init__(self, d: int, learn: bool):
        super().__init__()
        self.routing, self.content = nn.Parameter(0.1 * torch.randn(d)), nn.Parameter(0.1 * torch.randn(d))
        self.learn = learn

    def forward(self, k, v, spans):
        q1, q2 = (x.expand(k.shape[0], 1, 1, -1) for x in (self.routing, self.content))
        if not self.learn:
            q1 = torch.randn_like(q1)
        found = search_spans(q1, k, NEAR, spans=spans)
        return attend_spans(q2, k, v, found, NEAR, scale=1.0)[:, 0, 0]


def haystack(batch: int, n: int = 196, d: int = 8):
    """Keys among noise: one direction marks the surroundings of the needle, another the needle itself."""
    reach = 2 * math.isqrt(n)  # from one anchor to the next
    at = torch.randint(10, n - reach - 20, (batch,))
    k = 0.5 * torch.randn(batch, 1, n, d)
    distance = torch.arange(n) - at[:, None]
    k[:, 0, :, 0] += 2.0 * ((distance >= 0) & (distance < reach))
    k[:, 0, :, 1] += 3.0 * (distance == 0)
    v = torch.randn(batch, 1, n, 2)
    return k, v, v[torch.arange(batch), 0, at]


def train(learn: bool, steps: int, batch: int, n: int = 196) -> float:
    torch.manual_seed(1)
    module = Seeker(8, learn)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(steps):
        k, v, wanted = haystack(batch, n)
        optimizer.zero_grad()
        (module(k, v, 3) - wanted).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        k, v, wanted = haystack(512, n)
        return float((module(k, v, 1) - wanted).square().mean())


def test_the_search_learns_through_its_gate_what_random_routing_cannot():
    learned, fixed = train(True, 80, 48), train(False, 80, 48)
    # Predicting zero costs 1.
    assert learned < 0.1
    assert fixed > 0.8


@pytest.mark.slow
def test_a_longer_training_finds_needles_in_a_longer_haystack():
    assert train(True, 400, 64, 900) < 0.15
    assert train(False, 400, 64, 900) > 0.9


def test_low_precision_stays_near():
    q1, q2, k, v = (x.bfloat16() for x in draw(60, dtype=torch.float32))
    exact = superlinear_attention(*(x.double() for x in (q1, q2, k, v)), NEAR)
    out = superlinear_attention(q1, q2, k, v, NEAR)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.03


def test_bad_arguments_are_named():
    q1, q2, k, v = draw(12)
    with pytest.raises(ArgumentError, match=r"^q1:"):
        superlinear_attention(q1[:, :, :4], q2, k, v)
    with pytest.raises(ArgumentError, match=r"^spans:"):
        superlinear_attention(q1, q2, k, v, spans=0)
    with pytest.raises(ArgumentError, match=r"^kv_heads:"):
        SuperlinearAttention(dim=16, heads=4, kv_heads=3)
    with pytest.raises(ArgumentError, match=r"^index:"):
        SuperlinearAttention(dim=16, heads=4, index=-1)
