"""The scan in the core: exact at every level, bit-equal on any threads, one node, and refused where it cannot run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.kernels.cpu import scan as cpu_scan
from foveate.kernels.cpu.library import SCAN_FORWARD, forced_isa, isa_levels, library
from foveate.kernels.cpu.scan import Scan, backward, forward
from foveate.kernels.cpu.scan_op import scan_backward_op, scan_op
from foveate.kernels.flops import count_flops
from foveate.kernels.scan import chunk as chunk_form
from foveate.kernels.scan import scan, scan_cost
from foveate.kernels.scan.contract import ScanProblem
from foveate.kernels.scan.watch import watch_scans
from tests.kernels.scan.cases import KINDS, Case, make

NAMES = ("out", "last", "q", "k", "v", "decay", "state")


def draw(
    seed=0, *, b=1, h=2, n=70, dk=5, dv=20, shape="token", size=0.1, strong=0.0, inclusive=True, state=True
):
    """A call in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    sizes = {
        "none": None,
        "head": (1, h, 1, 1),
        "token": (b, h, n, 1),
        "shared": (1, 1, n, 1),
        "channel": (b, h, n, dk),
        "channels": (1, h, 1, dk),
    }[shape]
    decay = None
    if sizes is not None:
        lot = torch.rand(sizes, generator=g)
        decay = -torch.rand(sizes, generator=g, dtype=torch.float64) * size
        decay = torch.where(lot < strong / 2, -1e4, torch.where(lot < strong, -torch.inf, decay))
    begin = normal(b, h, dk, dv) if state else None
    return Scan(normal(b, h, n, dk), normal(b, h, n, dk), normal(b, h, n, dv), decay, begin, inclusive)


def narrow(x: Scan, dtype=torch.float32) -> Scan:
    return Scan(*(t if t is None else t.to(dtype) for t in x[:5]), x.inclusive)


def by_chunks(x: Scan, grads) -> list:
    """Results and gradients of the chunk form in the dtype of x; None where there is no input."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in x[:5]]
    q, k, v, decay, state = leaves
    begin = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    out, last = chunk_form.run(ScanProblem(q, k, v, decay, begin, None, x.inclusive), 64)
    real = [t for t in leaves if t is not None]
    weights = [g.to(out.dtype) for g in grads]
    found = iter(torch.autograd.grad((out * weights[0]).sum() + (last * weights[1]).sum(), real))
    return [out.detach(), last.detach(), *(t if t is None else next(found) for t in leaves)]


def by_core(x: Scan, grads) -> list:
    out, last, borders = forward(x, last=True, keep=True)
    out_grad, last_grad = (g.float() for g in grads)
    return [out, last, *backward(x, out_grad, last_grad, borders, decay=True, state=x.state is not None)]


def grads_of(x: Scan):
    g = torch.Generator().manual_seed(1)
    last = (*x.q.shape[:2], x.q.shape[3], x.v.shape[3])
    return [torch.randn(size, generator=g, dtype=torch.float64) for size in (x.v.shape, last)]


def check_against_truth(x: Scan):
    """Errors of the core are at most twice (outputs) and three times (gradients) those of the chunk form in float32."""
    grads = grads_of(x)
    truth, plain, ours = by_chunks(x, grads), by_chunks(narrow(x), grads), by_core(narrow(x), grads)
    for i, (name, t, p, o) in enumerate(zip(NAMES, truth, plain, ours, strict=True)):
        if t is None:
            assert o is None
            continue
        assert o.shape == t.shape, name
        budget = (2 if i < 2 else 3) * float((p - t).abs().max())
        # A few results of few terms may be exact by luck.
        assert float((o - t).abs().max()) <= budget + 2e-6 * max(1.0, float(t.abs().max())), name


@st.composite
def calls(draw_):
    return draw(
        draw_(st.integers(0, 10**6)),
        b=draw_(st.integers(1, 2)),
        h=draw_(st.integers(1, 3)),
        n=draw_(st.one_of(st.integers(1, 150), st.sampled_from([31, 32, 33, 63, 64, 65, 511, 512, 513, 545]))),
        dk=draw_(st.sampled_from([1, 3, 8, 16, 17, 40])),
        dv=draw_(st.sampled_from([1, 4, 15, 16, 33, 65])),
        shape=draw_(st.sampled_from(["none", "head", "token", "shared", "channel", "channels"])),
        size=draw_(st.sampled_from([0.0, 1e-8, 1e-3, 0.5, 30.0])),
        strong=draw_(st.sampled_from([0.0, 0.1, 1.0])),
        inclusive=draw_(st.booleans()),
        state=draw_(st.booleans()),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(x=calls(), level=st.sampled_from(isa_levels()))
def test_values_and_gradients_keep_the_budget_of_the_chunk_form(x, level):
    with forced_isa(level):
        check_against_truth(x)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("shape", ["none", "token", "channel"])
def test_levels(level, shape):
    with forced_isa(level):
        check_against_truth(draw(7, n=130, dk=24, dv=40, shape=shape, strong=0.05))


@pytest.mark.parametrize("size", [1e-8, 1e-3])
@pytest.mark.parametrize("shape", ["none", "head", "token", "channel"])
def test_long_memories_keep_their_digits(shape, size):
    check_against_truth(draw(3, n=3000, h=1, dk=8, dv=8, shape=shape, size=size))


@pytest.mark.parametrize("shape", ["none", "head", "token", "channel"])
def test_any_number_of_threads_gives_the_same_bits(shape):
    x = narrow(draw(n=700, h=3, dk=20, dv=70, shape=shape, strong=0.02))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(by_core(x, grads_of(x)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_every_number_of_the_results_is_written(monkeypatch):
    def poisoned(*shape, **options):
        size = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        return torch.full(size if isinstance(size, tuple) else (size,), torch.nan, **options)

    for shape in ("none", "token", "channel"):
        for n in (1, 65, 530):
            x = narrow(draw(n=n, dk=9, dv=50, shape=shape))
            clean = by_core(x, grads_of(x))
            with monkeypatch.context() as patch:
                patch.setattr(cpu_scan.torch, "empty", poisoned)
                found = by_core(x, grads_of(x))
            for a, b in zip(clean, found, strict=True):
                assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("shape", ["token", "channel"])
def test_layouts_do_not_matter(shape):
    x = narrow(draw(b=2, n=70, dk=6, dv=10, shape=shape))
    strided = [
        t
        if t is None
        else torch.stack([t, t.flip(0)], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
        for t in x[:5]
    ]
    every_second = [t if t is None else torch.stack([t, t + 1], -1)[..., 0] for t in x[:5]]
    for tensors in (strided, every_second):
        for a, b in zip(by_core(x, grads_of(x)), by_core(Scan(*tensors, True), grads_of(x)), strict=True):
            assert torch.equal(a, b)


def test_one_row_for_all_tokens():
    x = narrow(draw(n=70, dk=6, dv=10))
    for grad in (torch.ones(()), torch.randn(10), torch.randn(1, 2, 1, 1)):
        wide = [grad.expand(x.v.shape), grads_of(x)[1]]
        for a, b in zip(by_core(x, wide), by_core(x, [wide[0].contiguous(), wide[1]]), strict=True):
            assert torch.equal(a, b)


# ---- through `scan` -------------------------------------------------------------------------------------------------


def results(case: Case, backend, **options):
    leaves = [x.detach().clone().requires_grad_() for x in case.leaves]
    q, k, v, state, *decay = leaves
    if "causal" not in options or options["causal"] == "reverse":
        options |= {"initial_state": state, "return_state": True}
    found = scan(q, k, v, decay=decay[0] if decay else case.decay, backend=backend, **options)
    outs = found if isinstance(found, tuple) else (found,)
    loss = sum((x.double() * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outs)
    return [*outs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, "reverse", False])
@pytest.mark.parametrize("packed", [False, True])
def test_every_direction_and_packed_sequences(kind, causal, packed):
    case = make(b=1, h=4, hkv=2, n=75, kind=kind, strong=0.05).to(torch.float32)
    options = {} if causal is True else {"causal": causal}
    if packed:
        options["segments"] = torch.tensor([[-1] * 3 + [4] * 30 + [7] * 20 + [-1] + [7] * 11 + [1] * 10])
    for a, b in zip(results(case, "cpu", **options), results(case, "chunk", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    case = make(n=150, kind="token").to(dtype)
    out, state = scan(case.q, case.k, case.v, decay=case.decay, return_state=True, backend="cpu")
    wide = case.to(torch.float32)
    want, last = scan(wide.q, wide.k, wide.v, decay=wide.decay, return_state=True, backend="cpu")
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(out, want.to(dtype))
    assert torch.equal(state, last)


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
def test_second_derivatives_go_through_the_chunk_form(kind):
    case = make(b=1, n=40, kind=kind).to(torch.float32)
    found = []
    for backend in ("cpu", "chunk"):
        x = case.k.clone().requires_grad_()  # in two places: each has a gradient of its own
        g = case.decay.clone().requires_grad_() if kind != "none" else None
        leaves = [x] if g is None else [x, g]
        out = scan(x, x, case.v, decay=g, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(y.square().sum() for y in first), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


def test_the_core_is_chosen_and_says_where_it_is_not():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    with watch_scans() as seen:
        scan(q, k, v)
        scan(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay=-torch.rand(1, 2, 40, 8))
        scan(q.double(), k.double(), v.double())
        scan(q, k, v, chunk=16)
        scan(q, k, v, causal=False)
        scan(q[:, :, :1], k[:, :, :1], v[:, :, :1])
        torch.func.vmap(lambda x: scan(x[None], k, v))(q)
        torch.func.jvp(lambda x: scan(x, k, v), (q,), (q,))
    forms = ["cpu", "cpu", "chunk", "chunk", "chunk", "recurrent", "chunk", "chunk"]
    assert [call.backend for call in seen] == forms
    assert [call.chunk for call in seen[:2]] == [64, 32]
    with pytest.raises(UnsupportedError, match="sums in float32, this call sums in float64"):
        scan(q.double(), k.double(), v.double(), backend="cpu")
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.func.vmap(lambda x: scan(x[None], k, v, backend="cpu"))(q)


def test_without_the_core_the_chunk_form_runs(monkeypatch):
    monkeypatch.setattr("foveate.kernels.scan.core._absent", lambda: "the C++ core was not built")
    x = torch.randn(1, 2, 40, 8)
    with watch_scans() as seen:
        scan(x, x, x)
    assert seen[0].backend == "chunk"
    with pytest.raises(UnsupportedError, match="was not built"):
        scan(x, x, x, backend="cpu")


def test_nothing_in_gives_nothing_out():
    for n, dk, dv in ((0, 3, 4), (5, 3, 0)):
        out, state = scan(
            torch.ones(2, 1, n, dk), torch.ones(2, 1, n, dk), torch.ones(2, 1, n, dv), return_state=True, backend="cpu"
        )  # fmt: skip
        assert out.shape == (2, 1, n, dv)
        assert state.shape == (2, 1, dk, dv)


# ---- operators ------------------------------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("shape", "last"), [("none", False), ("token", True), ("channels", True)])
def test_opcheck(shape, last):
    x = narrow(draw(n=20, shape=shape, state=last))
    tensors = [t if t is None else t.requires_grad_() for t in x[:5]]
    opcheck(scan_op, (*tensors, True, last, True), test_utils=CHECKS)


def test_opcheck_of_the_backward():
    x = narrow(draw(n=600, shape="channel"))
    out, last, borders = scan_op(*x, True, True)
    opcheck(scan_backward_op, (out, last, borders, *x, True, True), test_utils=CHECKS[:2])


def test_one_graph_and_its_flops():
    case = make(n=70, kind="token").to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, g: scan(q * 2, case.k, case.v, decay=g), fullgraph=True, backend="aot_eager"
    )
    leaves = [case.q.requires_grad_(), case.decay.requires_grad_()]
    found = []
    for fn in (compiled, lambda q, g: scan(q * 2, case.k, case.v, decay=g)):
        out = fn(*leaves)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(Plain(), (case.q.detach(), case.k, case.v))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert names.count("foveate.scan.default") == 1


def test_flops_are_those_of_the_contract():
    case = make(n=70, kind="token").to(torch.float32)
    q = case.q.requires_grad_()
    cost = scan_cost(batch=2, heads=2, n=70, dk=3, dv=4, decay="token")
    assert count_flops(lambda: scan(q, case.k, case.v, decay=case.decay)) == cost.flops
    both = count_flops(lambda: scan(q, case.k, case.v, decay=case.decay).sum().backward())
    assert 2 * cost.flops < both - cost.flops < 3 * cost.flops


class Plain(torch.nn.Module):
    def forward(self, q, k, v):
        return scan(q, k, v)


BROKEN = {
    "q": lambda x: x._replace(q=x.q.double()),
    "k": lambda x: x._replace(k=x.k[:, :, :-1]),
    "v": lambda x: x._replace(v=x.v[:1, :1]),
    "decay": lambda x: x._replace(decay=x.decay[:, :, :-1]),
    "state": lambda x: x._replace(state=x.state.mT),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_operator_checks_what_it_is_given(name):
    x = narrow(draw(n=20))
    with pytest.raises(ArgumentError, match=rf"^{name}"):
        scan_op(*BROKEN[name](x), True, True)
    out, last, borders = scan_op(*x, True, True)
    with pytest.raises(ArgumentError, match="grad_last"):
        scan_backward_op(out, last.mT, borders, *x, True, True)


def test_a_gradient_that_was_not_prepared():
    x = narrow(draw(n=20))
    with pytest.raises(UnsupportedError, match="keep=True"):
        scan_op(x.q.requires_grad_(), *x[1:], False, False)[0].sum().backward()


def test_a_job_the_core_refuses():
    with pytest.raises(UnsupportedError, match="does not have"):
        library().launch(SCAN_FORWARD, cpu_scan.ScanArg(isa=99))
