import math

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.kernels.merge import merge
from foveate.scores.rules import Exp, ReLU, Rule, Sigmoid, Softmax, as_rule
from tests.scores.blocks import gradients

RULES = [Softmax(), Softmax(sink=0.3), Sigmoid(-1.0), ReLU(), Exp()]


def plain(rule, logits):
    """One row of logits (a list; -inf = absent) to weights, in plain Python."""
    if isinstance(rule, Softmax):
        total = sum(math.exp(x) for x in logits) + (math.exp(rule.sink) if rule.sink is not None else 0.0)
        return [math.exp(x) / total if total else 0.0 for x in logits]
    f = {
        Sigmoid: lambda x: 1 / (1 + math.exp(-(x - 1.0))) if x > -math.inf else 0.0,
        ReLU: lambda x: max(x, 0.0),
        Exp: math.exp,
    }[type(rule)]
    return [f(x) for x in logits]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equals_a_python_loop(rule):
    logits = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    allowed = torch.rand(1, 2, 3, 4) < 0.6
    allowed[0, 0, 0] = False
    weights, lse = rule.weights(logits, allowed)
    hidden = logits.masked_fill(~allowed, -math.inf)
    for h in range(2):
        for i in range(3):
            want = plain(rule, hidden[0, h, i].tolist())
            torch.testing.assert_close(weights[0, h, i], torch.tensor(want, dtype=torch.float64))
    assert (lse is not None) == rule.has_lse
    if isinstance(rule, Softmax):
        sink = [] if rule.sink is None else [torch.full((1, 2, 3, 1), rule.sink, dtype=torch.float64)]
        torch.testing.assert_close(lse, torch.logsumexp(torch.cat([hidden, *sink], -1), -1))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_keys_at_all(rule):
    weights, lse = rule.weights(torch.zeros(1, 1, 2, 0))
    assert weights.shape == (1, 1, 2, 0)
    if lse is not None:
        assert lse.flatten().tolist() == [
            rule.sink if rule.sink is not None else -math.inf
        ] * 2 or math.isclose(lse[0, 0, 0], rule.sink, rel_tol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_masked_rows_have_zero_gradient_twice(rule):
    logits = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    weights, lse = rule.weights(logits, allowed)
    assert weights[0, 0, 1].abs().max() == 0
    total = weights.square().sum() + (lse[..., 0].sum() if lse is not None else 0)
    (grad,) = torch.autograd.grad(total, logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    for g in (grad, second):
        assert torch.isfinite(g).all()
        assert g[0, 0, 1].abs().max() == 0
        assert g[0, 0, 0, 1] == 0


def test_softmax_does_not_overflow():
    weights, lse = Softmax(sink=-1e30).weights(torch.tensor([[[[1e30, 1e30]]]]))
    assert weights.flatten().tolist() == [0.5, 0.5]
    assert torch.isfinite(lse).all()


def test_sink_is_a_key_without_value():
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    sink = torch.randn(3, dtype=torch.float64)
    out, lse = attend(q, k, v, weigh=Softmax(sink), return_lse=True, backend="reference")
    logits = torch.cat([q @ k.mT / 5**0.5, sink[None, :, None, None].expand(2, 3, 4, 1)], -1)
    torch.testing.assert_close(out, logits.softmax(-1)[..., :-1] @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    rule = Softmax(sink)
    bare = attend(q, k, v, weigh=rule.bare(), return_lse=True, backend="reference")
    for a, b in zip(rule.finish(*bare), (out, lse), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", [Sigmoid(-1.0), ReLU(), Exp()], ids=repr)
def test_rules_without_a_row_sum_add_up_over_keys(rule):
    assert rule.mergeable == "sum"
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    halves = [attend(q, k[:, :, s], v[:, :, s], weigh=rule) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(merge(halves), attend(q, k, v, weigh=rule))


def test_sigmoid_at_zero_logits():
    n = 7
    q = torch.zeros(1, 1, n, 2)
    out = attend(q, q, torch.ones(1, 1, n, 1), weigh=Sigmoid(-math.log(n)))
    torch.testing.assert_close(out, torch.full_like(out, n / (n + 1)))


@pytest.mark.parametrize("rule", [Softmax, Sigmoid])
def test_gradients_reach_sink_and_bias(rule):
    assert gradients(lambda t: {"weigh": rule(t)}, torch.randn(2, dtype=torch.float64))


@pytest.mark.parametrize("rule", [ReLU(), Exp()], ids=repr)
def test_gradients(rule):
    assert gradients(lambda: {"weigh": rule})


def test_a_rule_of_ones_own():
    class Square(Rule):
        def weights(self, logits, allowed=None):
            return logits.square() if allowed is None else logits.square() * allowed, None

    q = torch.randn(1, 1, 3, 2)
    torch.testing.assert_close(
        attend(q, q, q, weigh=Square(), scale=1.0, backend="reference"), (q @ q.mT) ** 2 @ q
    )


def test_bad_rules_are_named():
    with pytest.raises(ArgumentError, match=r"^weigh: .*Write weigh=Softmax\(\)"):
        as_rule(Softmax)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^weigh: "):
        as_rule("softmax")  # type: ignore[arg-type]
    q = torch.randn(1, 2, 3, 2)
    with pytest.raises(ArgumentError, match=r"weigh: Softmax.sink"):
        attend(q, q, q, weigh=Softmax(torch.ones(3)))
    with pytest.raises(ArgumentError, match=r"weigh: Sigmoid.bias"):
        attend(q, q, q, weigh=Sigmoid(torch.ones(1, 2, 3)))
