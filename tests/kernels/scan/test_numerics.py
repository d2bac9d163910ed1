"""Precision, stability and the transforms of torch: autocast, compile, vmap."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.kernels.cpu.library import absent
from foveate.kernels.scan import chunk, crossover_length, scan, scan_cost
from tests.kernels.scan.cases import KINDS, Case, make

HALVES = (torch.bfloat16, torch.float16)
# The forms that work in chunks; without the core, tests/kernels/cpu says why it is not there.
CHUNKED = ("chunk", "cpu") if absent() is None else ("chunk",)


def plainly(case: Case):
    """The quadratic form written plainly in the dtype of the case."""
    n, dtype = case.q.shape[2], case.q.dtype
    i = torch.arange(n)
    fade = (case.decay.view(-1, 1, 1).to(dtype) * (i[:, None] - i).to(dtype)).exp().tril()
    return ((case.q @ case.k.mT) * fade) @ case.v


def worst(a, b):
    return (a.double() - b).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n", [100, 257])
@pytest.mark.parametrize("backend", CHUNKED)
def test_error_budget(dtype, n, backend):
    case = make(n=n, dk=16, dv=16, kind="head", size=0.1, chunk=64).to(dtype)
    truth_case, leaves = case.to(torch.float64), [case.q, case.k, case.v]
    results = {}
    for name, this, compute in (
        ("truth", truth_case, plainly),
        ("plain", case, plainly),
        ("ours", case, lambda c: scan(c.q, c.k, c.v, decay=c.decay, backend=backend)),
    ):
        leaves = [x.requires_grad_() for x in (this.q, this.k, this.v)]
        out = compute(this)
        results[name] = (out, *torch.autograd.grad(out.double().sin().sum(), leaves))
    for i, factor in enumerate((2, 3, 3, 3)):
        ours, plain, truth = (results[name][i] for name in ("ours", "plain", "truth"))
        assert ours.dtype == dtype
        assert worst(ours, truth) <= factor * worst(plain, truth)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_states_of_half_precision_inputs_are_float32(dtype):
    case = make(n=20, kind="token").to(dtype)
    out, state = scan(case.q, case.k, case.v, decay=case.decay, return_state=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    _, exact = scan(
        *(x.double() for x in (case.q, case.k, case.v)), decay=case.decay.double(), return_state=True
    )
    torch.testing.assert_close(state.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1.0, 50.0])
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("backend", CHUNKED)
def test_small_and_large_decays_keep_their_digits(size, kind, backend):
    case = make(n=400, b=1, h=2, dk=8, dv=8, kind=kind, size=size, strong=0.05, chunk=64)
    truth = scan(case.q, case.k, case.v, decay=case.decay, backend="recurrent")
    single = case.to(torch.float32)
    ours = scan(single.q, single.k, single.v, decay=single.decay, backend=backend)
    plain = scan(single.q, single.k, single.v, decay=single.decay, backend="recurrent")
    assert worst(ours, truth) <= 2 * worst(plain, truth) + 1e-6 * truth.abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strong", [0.1, 1.0])
@pytest.mark.parametrize("backend", CHUNKED)
def test_full_resets_give_no_nan(kind, strong, backend):
    case = make(n=70, kind=kind, strong=strong, chunk=64).to(torch.float32)
    for x in case.leaves:
        x.requires_grad_()
    options = {"initial_state": case.state, "return_state": True, "backend": backend}
    out, state = scan(case.q, case.k, case.v, decay=case.decay, **options)
    (out.sum() + state.sum()).backward()
    for x in (out, state, *(leaf.grad for leaf in case.leaves)):
        assert x.isfinite().all()


def stability(n, kind, size, backend, d=8):
    case = make(b=1, h=2, n=n, dk=d, dv=d, kind=kind, size=size, chunk=64)
    single = case.to(torch.float32)
    truth, last = scan(case.q, case.k, case.v, decay=case.decay, return_state=True)
    ours, state = scan(single.q, single.k, single.v, decay=single.decay, return_state=True, backend=backend)
    assert worst(ours, truth) <= 2e-5 * truth.abs().max().item()
    assert worst(state, last) <= 2e-5 * last.abs().max().item()


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
@pytest.mark.parametrize("backend", CHUNKED)
def test_ten_thousand_tokens_stay_exact(kind, backend):
    stability(10_000, kind, 1e-3, backend)


@pytest.mark.parametrize(("kind", "size"), [("none", 0), ("head", 1e-4), ("token", 1e-8), ("channel", 1e-3)])
def test_a_hundred_thousand_tokens_stay_exact_with_few_channels(kind, size):
    stability(100_000, kind, size, "auto", d=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("backend", CHUNKED)
def test_a_hundred_thousand_tokens_stay_exact(kind, size, backend):
    stability(100_000, kind, size, backend)


def test_autocast_computes_in_float32():
    case = make(n=100, dk=16, dv=16, kind="head", chunk=64).to(torch.bfloat16)
    q, k, v, decay = case.q, case.k, case.v, case.decay
    expected, widest = scan(q, k, v, decay=decay), scan(q.float(), k.float(), v.float(), decay=decay)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(q, k, v, decay=decay), expected)
        mixed = scan(q.float(), k, v, decay=decay)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, widest)


@pytest.mark.parametrize(
    ("kind", "causal"), [("none", True), ("head", False), ("token", True), ("channel", True)]
)
def test_compiles_whole(kind, causal):
    case = make(n=37, kind=kind, chunk=8).to(torch.float32)
    torch._dynamo.reset()

    def call(q, k, v):
        return scan(q, k, v, decay=case.decay, causal=causal, chunk=8)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(case.q, case.k, case.v), call(case.q, case.k, case.v))


@pytest.mark.slow
def test_compiles_whole_with_inductor():
    case = make(n=130, kind="token", chunk=64).to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: scan(q, case.k, case.v, decay=case.decay), fullgraph=True)
    torch.testing.assert_close(
        compiled(case.q), scan(case.q, case.k, case.v, decay=case.decay), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["chunk", "recurrent", "reference"])
@pytest.mark.parametrize("kind", ["none", "token", "channel"])
@pytest.mark.parametrize("together", [1, 1 << 18])
def test_vmap_and_per_sample_gradients(backend, kind, together, monkeypatch):
    monkeypatch.setattr(chunk, "TOGETHER", together)
    case = make(b=3, n=9, kind=kind, chunk=4)
    decay = torch.zeros(3, 2, 9, dtype=torch.float64) if case.decay is None else case.decay

    def one(q, k, v, g):
        return scan(q[None], k[None], v[None], decay=g[None], backend=backend, chunk=4)[0]

    whole = scan(case.q, case.k, case.v, decay=decay, backend=backend, chunk=4)
    torch.testing.assert_close(torch.func.vmap(one)(case.q, case.k, case.v, decay), whole)
    grads = torch.func.vmap(torch.func.grad(lambda *x: one(*x).sum()))(case.q, case.k, case.v, decay)
    q = case.q.clone().requires_grad_()
    scan(q, case.k, case.v, decay=decay, backend=backend, chunk=4).sum().backward()
    torch.testing.assert_close(grads, q.grad)


@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
@pytest.mark.parametrize(("n", "chunk"), [(256, 64), (130, 32), (70, 24)])
def test_flops_are_those_torch_counts(kind, n, chunk):
    case = make(b=2, h=3, n=n, dk=8, dv=6, kind=kind, chunk=chunk).to(torch.float32)
    with FlopCounterMode(display=False) as counter:
        scan(case.q, case.k, case.v, decay=case.decay, chunk=chunk)
    cost = scan_cost(batch=2, heads=3, n=n, dk=8, dv=6, decay=kind, chunk=chunk)
    assert cost.flops == counter.get_total_flops()
    assert cost.state_bytes == 4 * 2 * 3 * 8 * 6


def test_crossover_is_where_the_operations_change_order():
    for decay in ("head", "channel"):
        n = crossover_length(dk=64, dv=32, decay=decay, chunk=16)
        per_token = scan_cost(batch=1, heads=1, n=16, dk=64, dv=32, decay=decay, chunk=16).flops / 16
        assert (n + 1) * (64 + 32) > per_token >= n * (64 + 32)


def test_unknown_decay_words_are_named():
    with pytest.raises(ValueError, match=r"^decay: expected one of"):
        scan_cost(batch=1, heads=1, n=1, dk=1, dv=1, decay="slow")
