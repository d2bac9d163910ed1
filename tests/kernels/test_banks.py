"""Banks of keys: one rule over all of them, whoever sees which and whatever is said about each."""

import pytest
import torch

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.banks import Bank, attend_banks, attend_groups, join_banks
from foveate.kernels.cpu.library import absent
from foveate.kernels.merge import merge
from foveate.patterns.basic import Causal, Full
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.scores.distance import ALiBi
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Sigmoid
from foveate.scores.temperature import RowFactor, SoftCap

B, H, N, D = 2, 4, 24, 8
GRID = Grid(4, 6)

BACKENDS = ("tiles", "sdpa") if absent() else ("tiles", "cpu", "sdpa")


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def routed(b=B, h=H, n_k=N):
    q = torch.arange(N).view(1, 1, 4, 6).expand(b, h, 4, 6)
    return Selection(q, torch.rand(b, h, 4, n_k).argsort(-1)[..., :5], n_q=N, n_k=n_k)


def cases():
    return {
        "memory": [
            Bank(draw(B, H, N, D), draw(B, H, N, 3), Neighborhood(GRID, 3)),
            Bank(draw(1, H, 5, D), draw(1, 1, 5, 3)),
        ],
        "specials": [
            Bank(draw(B, H, N, D), draw(B, H, N, 3), with_specials(Neighborhood((2, 11), (1, 3)), 2)),
            Bank(draw(B, H, 5, D), draw(B, H, 5, 3)),
        ],
        "biases": [
            Bank(draw(B, H, N, D), draw(B, H, N, 3), Causal(), score=ALiBi(torch.rand(H).double())),
            Bank(draw(B, H, 6, D), draw(B, H, 6, 3), key_bias=draw(H, 6)),
            Bank(draw(B, H, 4, D), draw(B, H, 4, 3), Causal("start"), key_bias=draw(4)),
        ],
        "routed": [
            Bank(draw(B, H, N, D), draw(B, H, N, 3), routed(), score=RelativeTable(draw(H, 7, 11), GRID)),
            Bank(draw(B, H, 9, D), draw(B, H, 9, 3), routed(n_k=9), draw(B, 1, 9), mask=torch.rand(B, 1, N, 9) < 0.8),
            Bank(draw(B, H, 2, D), draw(B, H, 2, 3), mask=torch.rand(N, 2) < 0.8),
        ],
        "grouped": [
            Bank(draw(B, 2, N, D), draw(B, 2, N, 3), Neighborhood(GRID, 3)),
            Bank(draw(B, 2, 3, D), draw(B, 2, 3, 3), mask=draw(N, 3)),
            Bank(draw(B, 2, 0, D), draw(B, 2, 0, 3), Causal()),
        ],
    }  # fmt: skip


def pieces(q, banks):
    """The same by separate attentions, merged by log-sum-exp."""
    outs, lses = [], []
    for bank in banks:
        if not bank.k.shape[2]:
            continue
        k, v = (x.expand(B, max(x.shape[1], bank.k.shape[1]), -1, -1) for x in (bank.k, bank.v))
        mask = bank.mask
        if bank.key_bias is not None:
            bias = bank.key_bias[..., None, :]
            mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
        out, lse = attend(
            q, k, v, where=bank.where, score=bank.score, mask=mask, return_lse=True, backend="reference"
        )
        outs.append(out)
        lses.append(lse)
    return merge(outs, lses)


@pytest.mark.parametrize("name", cases())
def test_banks_are_merged_attentions(name):
    torch.manual_seed(0)
    banks, q = cases()[name], draw(B, H, N, D)
    expected, lse = pieces(q, banks)
    for backend in ("reference", "tiles"):
        out, own = attend_banks(q, banks, backend=backend, return_lse=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(own, lse)


@pytest.mark.parametrize("name", ["memory", "specials", "routed", "grouped"])
def test_every_backend_serves_banks_in_single_precision(name):
    torch.manual_seed(0)
    banks, q = cases()[name], draw(B, H, N, D)
    expected, _ = pieces(q, banks)

    def single(x):
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    width = 8 - banks[0].v.shape[3]
    narrow = []
    for b in banks:
        v = torch.nn.functional.pad(single(b.v), (0, width))
        narrow.append(Bank(single(b.k), v, b.where, single(b.key_bias), None, single(b.mask)))
    if name != "routed":
        out = attend_banks(q.float(), narrow)
        torch.testing.assert_close(out[..., :3], expected.float(), rtol=1e-4, atol=1e-5)
    ours = [attend_banks(q.float(), narrow, backend=name) for name in BACKENDS]
    for out in ours[1:]:
        torch.testing.assert_close(out, ours[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_bank():
    torch.manual_seed(0)
    q = draw(1, H, N, D).requires_grad_()
    k, v = draw(1, 2, N, D).requires_grad_(), draw(1, 2, N, D).requires_grad_()
    memory, values = draw(1, 2, 3, D).requires_grad_(), draw(1, 2, 3, D).requires_grad_()
    bias = draw(H, 3).requires_grad_()

    def call(q, k, v, memory, values, bias):
        banks = [Bank(k, v, Neighborhood(GRID, 3)), Bank(memory, values, key_bias=bias)]
        return attend_banks(q, banks, backend="tiles")

    assert torch.autograd.gradcheck(call, (q, k, v, memory, values, bias), fast_mode=True)


def test_the_log_size_of_pooled_keys_makes_them_count_for_their_tokens():
    torch.manual_seed(0)
    q, one = draw(B, H, N, D), draw(B, H, 4, D)
    k, v = one.repeat_interleave(6, 2), one.repeat_interleave(6, 2)
    pooled = Bank(one[:, :, 1:], one[:, :, 1:], key_bias=torch.full((3,), 6.0).double().log())
    out = attend_banks(q, [Bank(k[:, :, :6], v[:, :, :6]), pooled])
    torch.testing.assert_close(out, attend(q, k, v))


def test_one_bank_is_attend_and_none_is_zeros():
    q, k, v = draw(B, H, N, D), draw(B, H, N, D), draw(B, H, N, D)
    empty = Bank(k[:, :, :0], v[:, :, :0], Causal())
    banks = [empty, Bank(k, v, Causal(), score=SoftCap(2.0))]
    torch.testing.assert_close(attend_banks(q, banks), attend(q, k, v, where=Causal(), score=SoftCap(2.0)))
    assert not attend_banks(q, [empty]).any()


def test_scores_of_the_call_concern_all_banks():
    q, k, v = draw(B, H, N, D), draw(B, H, N, D), draw(B, H, N, D)
    halves = [Bank(k[:, :, :12], v[:, :, :12]), Bank(k[:, :, 12:], v[:, :, 12:])]
    scores = (RowFactor(torch.rand(N).double()), SoftCap(1.0))
    torch.testing.assert_close(attend_banks(q, halves, score=scores), attend(q, k, v, score=scores))
    ours = attend_banks(q, halves, weigh=Sigmoid(0.3), scale=0.1)
    torch.testing.assert_close(ours, attend(q, k, v, weigh=Sigmoid(0.3), scale=0.1))


@pytest.mark.skipif(absent() is not None, reason="the C++ core is not built")
def test_the_core_knows_the_scores_of_a_bank_and_their_gradients():
    torch.manual_seed(0)
    q, k, v = (draw(B, H, N, D, dtype=torch.float32) for _ in range(3))
    grads = []
    for backend in ("cpu", "reference"):
        table = torch.linspace(-1, 1, H * 9).view(H, 3, 3).clone().requires_grad_()
        near = Bank(k, v, Neighborhood(GRID, 3), score=RelativeTable(table, GRID))
        out = attend_banks(q, [near, Bank(k[:, :, :3], v[:, :, :3])], backend=backend)
        out.square().sum().backward()
        grads.append((out, table.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_explain_takes_joined_banks():
    n = 64 * 64
    k = torch.empty(1, 8, n, 64, device="meta")
    more = torch.empty(1, 8, 16, 64, device="meta")
    joined = join_banks([Bank(k, k, Neighborhood((64, 64), 13)), Bank(more, more)], n)
    found = explain(k, **joined._asdict())
    assert found.pairs_needed == 8 * n * (169 + 16)
    assert found.pairs_computed < 4 * found.pairs_needed


def test_banks_compile():
    q, k, v = (draw(1, H, N, D, dtype=torch.float32) for _ in range(3))

    def call(q, k, v):
        return attend_banks(q, [Bank(k, v, Neighborhood(GRID, 3)), Bank(k[:, :, :2], v[:, :, :2])])

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_what_does_not_fit_is_named():
    q, k, v = draw(B, H, N, D), draw(B, H, N, D), draw(B, H, N, D)
    fine = Bank(k, v)
    wrong = {
        "banks": [],
        r"banks\[1\].k": [fine, Bank(k[0], v)],
        r"banks\[1\].v": [fine, Bank(k, v[:, :, :2])],
        "numbers of batches": [fine, Bank(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))],
        "key heads": [fine, Bank(k[:, :2], v[:, :2])],
        "one head size of all v": [fine, Bank(k, v[..., :2])],
        r"banks\[1\].where": [fine, Bank(k, v, Neighborhood((3, 3), 3))],
        r"banks\[1\].key_bias": [fine, Bank(k, v, key_bias=draw(3))],
        r"banks\[0\].mask": [Bank(k, v, mask=draw(N, 3)), fine],
    }
    for message, banks in wrong.items():
        with pytest.raises(ArgumentError, match=message):
            attend_banks(q, banks)
    with pytest.raises(UnsupportedError, match="put beside"):
        attend_banks(q, [Bank(k, v, Halo(GRID, 2, 1, "zero")), fine])
    joined = join_banks([Bank(k, v, Full()), fine], N)
    assert joined.where is None


def test_groups_are_one_softmax_too():
    torch.manual_seed(0)
    for name in ("memory", "routed", "biases"):
        banks, q = cases()[name], draw(B, H, N, D)
        expected = attend_banks(q, banks)
        torch.testing.assert_close(attend_groups(q, [banks[:1], banks[1:]]), expected)
        torch.testing.assert_close(attend_groups(q, [banks]), expected)
