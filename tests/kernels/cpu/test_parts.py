"""Queries in several cells under one softmax: the parts merged, against the plain definition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.kernels.attend import attend
from foveate.kernels.cpu import parts
from foveate.kernels.cpu.tiling import flattened
from foveate.kernels.problem import Problem
from foveate.routing.takers import STRETCH, select_takers
from foveate.scores.rules import Sigmoid

CASES = [
    # batch, heads, key heads, queries, keys, block, causal, (batches, heads) told apart
    (1, 2, 2, 300, 300, 16, True, (1, 2)),
    (2, 4, 2, 200, 230, 16, True, (2, 4)),
    (2, 4, 2, 150, 150, 32, False, (1, 1)),
    (2, 2, 2, 130, 60, 16, True, (2, 1)),
    (1, 1, 1, STRETCH + 70, STRETCH + 70, 64, True, (1, 1)),
]


def choose(n_q, n_k, block, lead):
    chosen = torch.rand(*lead, n_q, -(-n_k // block)) < 0.4
    chosen[:, :, 5] = False
    return chosen


@pytest.mark.parametrize(("b", "h", "h_kv", "n_q", "n_k", "block", "causal", "lead"), CASES)
def test_output_lse_and_gradients_equal_the_reference(b, h, h_kv, n_q, n_k, block, causal, lead):
    where = select_takers(choose(n_q, n_k, block, lead), block, n_q, n_k, causal=causal)
    q, k, v = (torch.randn(b, x, n, 12, requires_grad=True) for x, n in ((h, n_q), (h_kv, n_k), (h_kv, n_k)))
    weight, other = torch.randn(b, h, n_q, 12), torch.randn(b, h, n_q)
    assert parts.apart(Problem.of(q, k, v, where=where))
    found = []
    for backend in ("cpu", "reference"):
        out, lse = attend(q, k, v, where=where, backend=backend, return_lse=True)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = (out * weight).sum() + (lse * other).sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    assert (found[0][0][:, :, 5] == 0).all() or not causal
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_what_the_parts_cannot_do_goes_the_other_way_and_stays_right():
    where = select_takers(choose(120, 120, 16, (1, 1)), 16, 120, 120, causal=True)
    q, k, v = torch.randn(3, 1, 1, 120, 16)
    for options in ({"mask": torch.rand(120, 120) < 0.7}, {"weigh": Sigmoid(0.0)}):
        assert not parts.apart(Problem.of(q, k, v, where=where, **options))
        expected = attend(q, k, v, where=where, backend="reference", **options)
        found = attend(q, k, v, where=where, backend="cpu", **options)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    with FlopCounterMode(display=False):  # what counts operators sees one
        assert not parts.apart(Problem.of(q, k, v, where=where))
        found = attend(q, k, v, where=where, backend="cpu")
    torch.testing.assert_close(found, attend(q, k, v, where=where, backend="cpu"), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_plain_attention(dtype):
    n = 300
    where = select_takers(choose(n, n, 16, (1, 1)), 16, n, n, causal=True)
    inputs = [torch.randn(1, 2, n, 16).to(dtype) for _ in range(3)]
    weight = torch.randn(1, 2, n, 16).to(dtype)

    def run(backend, dtype, **options):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*given, backend=backend, **options)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), given)]

    assert parts.apart(Problem.of(*inputs, where=where))
    exact = run("reference", torch.float64, where=where)
    plain, mine = run("sdpa", dtype, mask=where.dense()), run("cpu", dtype, where=where)
    for index, (a, b, c) in enumerate(zip(mine, plain, exact, strict=True)):
        here, there = ((x.double() - c).square().mean().sqrt() for x in (a, b))
        assert here <= (3 if index else 2) * there


def test_copies_are_made_for_a_stretch_of_queries_at_a_time():
    n = 3 * STRETCH
    where = select_takers(torch.ones(1, 1, n, n // 64, dtype=torch.bool), 64, n, n, causal=True)
    assert not flattened(where.schedule)[2]
    made = parts._parts(where.schedule)
    assert [(part.first, part.last) for part in made] == [(i * STRETCH, (i + 1) * STRETCH) for i in range(3)]
    # Queries further on stand in more cells: earlier ones are not copied as often as they are.
    assert [part.width for part in made] == [16, 32, 48]


def test_a_second_derivative_is_refused():
    where = select_takers(choose(120, 120, 16, (1, 1)), 16, 120, 120, causal=True)
    q, k, v = torch.randn(3, 1, 1, 120, 16).requires_grad_().unbind(0)
    out = attend(q, k, v, where=where, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
