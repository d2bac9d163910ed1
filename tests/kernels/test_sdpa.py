"""Backend sdpa against the plain definition, and its refusals."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core.errors import UnsupportedError
from foveate.kernels import sdpa
from foveate.kernels.attend import attend
from foveate.kernels.problem import Problem
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.scores.after import Dropout, Multiply
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.distance import ALiBi
from foveate.scores.rules import Sigmoid, Softmax
from foveate.scores.temperature import SoftCap


def problem(n_q, n_k=None, *, b=2, h=4, hkv=2, d=8, d_v=8, dtype=torch.float64):
    n_k = n_k or n_q
    sizes = (b, h, n_q, d), (b, hkv, n_k, d), (b, hkv, n_k, d_v)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in sizes]


def agree(tensors, extra=(), **options):
    both = []
    for backend in ("sdpa", "reference"):
        out = attend(*tensors, backend=backend, **options)
        grads = torch.autograd.grad((out * torch.arange(out.shape[-1]).cos()).sum(), [*tensors, *extra])
        both.append([out, *grads])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Seeded: every process that collects these tests must find the same.
fixed = torch.Generator().manual_seed(0)
ids = torch.arange(20).view(1, 1, 2, 10)
DENSE = [
    ({}, 9, 9),
    ({"where": Full()}, 9, 7),
    ({"where": Causal()}, 9, 9),
    ({"where": Causal()}, 5, 9),
    ({"where": Causal()}, 1, 9),
    ({"where": Causal(align="start")}, 5, 9),
    ({"where": Causal(align="start")}, 9, 5),
    ({"where": Causal(), "score": ALiBi(torch.rand(4, generator=fixed))}, 9, 9),
    ({"where": Causal(), "mask": torch.rand(2, 1, 9, 9, generator=fixed) > 0.3}, 9, 9),
    ({"where": Neighborhood((4, 5), 3)}, 20, 20),
    ({"where": Halo((4, 6), 2, 1, border="zero")}, 24, 24),
    ({"where": Halo((4, 6), 2, 1, border="zero"), "mask": torch.rand(24, generator=fixed) > 0.3}, 24, 24),
    ({"where": Selection(ids, ids, n_q=20, n_k=20)}, 20, 20),
    ({"mask": torch.rand(9, generator=fixed) > 0.4}, 9, 9),
    ({"mask": torch.randn(4, 9, 9, generator=fixed)}, 9, 9),
    (
        {
            "mask": torch.randn(9, 9, dtype=torch.float64, generator=fixed),
            "score": KeyBias(torch.randn(9, generator=fixed)),
            "scale": 0.3,
        },
        9,
        9,
    ),
]


@pytest.mark.parametrize(("options", "n_q", "n_k"), DENSE, ids=lambda x: str(x)[:60])
def test_equals_the_definition(options, n_q, n_k):
    agree(problem(n_q, n_k), **options)
    agree(problem(n_q, n_k, hkv=4, d_v=5), **options)


def test_it_is_torch_when_nothing_is_asked_for():
    q, k, v = problem(9, h=4, hkv=4, dtype=torch.float32)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(
        attend(q, k, v, where=Causal()), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_rows_without_a_key_and_a_learned_bias():
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    bias = torch.randn(4, 9, 9, dtype=torch.float64, requires_grad=True)
    agree(problem(9), mask=mask)
    agree(problem(9), [bias], mask=mask, score=Bias(bias))
    q, k, v = problem(9)
    out = attend(q, k, v, mask=mask, score=Bias(bias), backend="sdpa")
    assert (out[:, :, 4] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v, bias]))


def test_dropout_uses_the_global_generator():
    q, k, _ = problem(64, b=1, h=2, hkv=2)
    v = torch.ones(1, 2, 64, 8, dtype=torch.float64)
    out = [None, None]
    for i in range(2):
        torch.manual_seed(5)
        out[i] = attend(q, k, v, after=Dropout(0.5), backend="sdpa")
    assert torch.equal(*out)
    assert 0.05 < out[0].std() < 0.5
    assert abs(out[0].mean() - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weigh": Sigmoid()}, "softmax only, not Sigmoid"),
        ({"weigh": Softmax(sink=0.0)}, "sink"),
        ({"return_lse": True}, "lse"),
        ({"score": SoftCap(3.0)}, "SoftCap does something else"),
        ({"after": Multiply(torch.ones(20, 20))}, "Multiply"),
        ({"after": Dropout(0.1, torch.Generator())}, "global generator"),
        ({"where": Selection(ids, ids, n_q=20, n_k=20, combine=Mean())}, "one softmax over all keys"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_refusals(options, match):
    q, k, v = problem(20)
    with pytest.raises(UnsupportedError, match=match):
        attend(q, k, v, backend="sdpa", **options)


def test_causal_flag():
    def flag(n_q, n_k, **options):
        return sdpa.is_causal(Problem.of((1, 1, n_q, 4), (1, 1, n_k, 4), (1, 1, n_k, 4), **options))

    assert flag(5, 5, where=Causal())
    assert flag(5, 7, where=Causal(align="start"))
    assert not flag(5, 7, where=Causal())
    assert not flag(5, 5, where=Causal(), mask=torch.ones(5, 5))
    assert not flag(5, 5, where=SlidingWindow(2))
    assert not flag(5, 5)
