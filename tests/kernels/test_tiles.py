"""Backend tiles against the definition: every pattern family and feature, gradients, error budgets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.kernels import fused, tiles
from foveate.kernels.attend import attend
from foveate.kernels.problem import Problem
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from foveate.patterns.schedule import Mean, Weights
from foveate.patterns.segments import Segments
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.scores.after import Add, Dropout, Multiply
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.distance import ALiBi
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Exp, ReLU, Sigmoid, Softmax
from foveate.scores.temperature import RowFactor, SoftCap

PATTERNS = {
    "neighborhood": (Neighborhood((12, 13), 5), 156),
    "neighborhood with dilation": (Neighborhood((21, 24), 5, dilation=(3, 2)), 504),
    "neighborhood 3-d, strided": (Neighborhood((5, 6, 7), 3, stride=2), 210),
    "neighborhood 1-d, window = axis": (Neighborhood((19,), 19), 19),
    "neighborhood, causal axes": (Neighborhood((9, 17), 3, causal=(True, False)), 153),
    "windows, shifted": (Windows((14, 14), 4, shift=2), 196),
    "halo": (Halo((15, 12), 4, 2), 180),
    "halo with phantoms": (Halo((15, 12), 4, 2, border="zero"), 180),
    "lattice": (Lattice((12, 12), 3), 144),
    "causal": (Causal(), 37),
    "sliding window": (SlidingWindow(7, 2), 97),
    "full": (Full(), 20),
    "class tokens": (with_specials(Neighborhood((12, 13), 5), 3), 159),
    "isolated tokens": (with_specials(Neighborhood((6, 7), 3), 2, rule="isolated"), 44),
    "sinks | sliding window": (Sinks(3) | SlidingWindow(5), 60),
    "neighborhood & causal": (Neighborhood((8, 9), 5) & Causal(), 72),
    "rows without a key": (Explicit(torch.arange(30)[:, None] % 3 > torch.arange(30)), 30),
    "block list": (BlockList(8, ((0, 1), (2, 0), (2, 2), (3, 1))), 29),
}


def problem(n, *, b=2, h=4, hkv=2, d=8, d_v=8, n_k=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (b, h, n, d), (b, hkv, n_k or n, d), (b, hkv, n_k or n, d_v)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def results(tensors, backend, extra=(), **options):
    """Return the outputs of a call, and the gradients of a random function of them."""
    out = attend(*tensors, backend=backend, **options)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (o.masked_fill(o == -torch.inf, 0.0) * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum()
        for o in outs
    )
    return [*outs, *torch.autograd.grad(loss, [*tensors, *extra])]


def agree(tensors, extra=(), **options):
    """Compare with the reference, in float64."""
    got, want = (results(tensors, name, extra, **options) for name in ("tiles", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_fused_and_plain(name):
    where, n = PATTERNS[name]
    agree(problem(n), where=where)
    agree(problem(n, hkv=1, d_v=12), where=where, return_lse=True)
    agree(problem(n, b=1), where=where, weigh=Sigmoid(bias=-1.0))


def test_cross_attention_and_decoding():
    agree(problem(7, n_k=19), where=Causal())
    agree(problem(1, n_k=19), where=SlidingWindow(6))
    agree(problem(19, n_k=7), where=Causal(align="start"))


@given(
    sizes=st.lists(st.integers(3, 11), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_neighborhood(sizes, data):
    window = [data.draw(st.integers(1, s)) for s in sizes]
    dilation = [data.draw(st.integers(1, s // w)) for s, w in zip(sizes, window, strict=True)]
    stride = [data.draw(st.integers(1, w)) for w in window]
    causal = [data.draw(st.booleans()) for _ in sizes]
    where = Neighborhood(sizes, window, dilation, stride, causal)
    tensors = problem(Grid(*sizes).numel, b=1, h=2, hkv=1, d=4, d_v=4)
    agree(tensors, where=where)


SCORES = {
    "row factor": lambda g: (
        RowFactor(torch.rand(4, 1, generator=g, dtype=torch.float64, requires_grad=True)),
    ),
    "soft cap": lambda g: (SoftCap(2.0),),
    "key bias": lambda g: (
        KeyBias(torch.randn(2, 1, 156, generator=g, dtype=torch.float64, requires_grad=True)),
    ),
    "bias": lambda g: (Bias(torch.randn(4, 156, 156, generator=g, dtype=torch.float64, requires_grad=True)),),
    "table": lambda g: (
        RelativeTable(
            torch.randn(4, 9, 9, generator=g, dtype=torch.float64, requires_grad=True), Grid(12, 13)
        ),
    ),
    "several": lambda g: (
        RowFactor(torch.rand(156, generator=g, dtype=torch.float64)),
        ALiBi(torch.rand(4)),
        SoftCap(3.0),
    ),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("learn", [True, False])
def test_scores(name, learn):
    score = SCORES[name](torch.Generator().manual_seed(3))
    held = [t for part in score for t in part.tensors().values()]
    if not learn:
        for tensor in held:
            tensor.requires_grad_(False)
    extra = [t for t in held if t.requires_grad]
    agree(problem(156), extra, where=Neighborhood((12, 13), 5), score=score)


def test_phantoms_get_position_terms():
    table = torch.randn(4, 15, 15, dtype=torch.float64)
    where = Halo((15, 12), 4, 2, border="zero")
    agree(problem(180), where=where, score=RelativeTable(table, Grid(15, 12)))


@pytest.mark.parametrize(
    "weigh", [Softmax(sink=0.3), Softmax(sink=torch.randn(4)), ReLU(), Exp(), Sigmoid()], ids=repr
)
def test_rules(weigh):
    agree(problem(156), where=Neighborhood((12, 13), 5), weigh=weigh)


def test_learned_sink_with_lse():
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    agree(problem(156), [sink], where=Neighborhood((12, 13), 5), weigh=Softmax(sink=sink), return_lse=True)


def test_after():
    keep = torch.rand(2, 4, 156, 156) > 0.3
    factor = torch.randn(156, 156, dtype=torch.float64, requires_grad=True)
    agree(
        problem(156),
        [factor],
        where=Neighborhood((12, 13), 5),
        after=(Dropout(0.3, keep=keep), Multiply(factor)),
    )
    agree(problem(156), [factor], where=Neighborhood((12, 13), 5), after=Add(factor))


def test_dropout_drops_the_share_it_says():
    q, k, _ = problem(400, b=1, h=2, hkv=2)
    v = torch.ones(1, 2, 400, 8, dtype=torch.float64)
    where = Neighborhood((20, 20), 7)
    out = attend(q, k, v, where=where, after=Dropout(0.25, torch.Generator().manual_seed(0)), backend="tiles")
    assert abs(out.mean().item() - 1.0) < 0.02
    again = attend(
        q, k, v, where=where, after=Dropout(0.25, torch.Generator().manual_seed(0)), backend="tiles"
    )
    assert torch.equal(out, again)
    assert out.std().item() > 0.05


@pytest.mark.parametrize("shape", [(2, 1, 1, 156), (1, 4, 156, 156), (156, 1)])
def test_masks(shape):
    where = Neighborhood((12, 13), 5)
    mask = torch.rand(shape) > 0.4
    agree(problem(156), where=where, mask=mask)
    agree(problem(156), where=where, mask=mask, weigh=ReLU())
    floats = torch.randn(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    agree(problem(156), where=where, mask=floats, return_lse=True)


# ---- routed cells
# ---------------------------------------------------------------------------------------------


def selection(b, h, *, cells=5, tq=4, tk=6, n=20, combine="lse", once=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    if once:
        q_ids = torch.stack([torch.randperm(n, generator=g)[: cells * tq] for _ in range(b * h)])
    else:
        q_ids = torch.randint(0, n, (b * h, cells * tq), generator=g)
    k_ids = torch.stack([torch.randperm(n, generator=g)[:tk] for _ in range(b * h * cells)])
    q_ids, k_ids = q_ids.view(b, h, cells, tq), k_ids.view(b, h, cells, tk).clone()
    k_ids[..., 0, 2:] = -1
    if once:
        q_ids = q_ids.clone()
        q_ids[..., 1, 0] = -1
    mask = torch.rand(b, h, cells, tq, tk, generator=g) > 0.2
    return Selection(q_ids, k_ids, mask, n_q=n, n_k=n, combine=combine)


@pytest.mark.parametrize(("b", "h"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_routed_cells(b, h):
    agree(problem(20), where=selection(b, h))
    agree(problem(20), where=selection(b, h), return_lse=True)
    agree(problem(20), where=selection(b, h), weigh=Sigmoid())
    agree(
        problem(20), where=selection(b, h), score=KeyBias(torch.randn(20)), mask=torch.rand(2, 1, 1, 20) > 0.3
    )


@pytest.mark.parametrize("rule", [Softmax(), Softmax(sink=0.1), Sigmoid()], ids=repr)
def test_a_query_in_several_cells_with_disjoint_keys(rule):
    where = selection(2, 4) | selection(2, 4, seed=5)
    assert not where.schedule.is_single_cell
    agree(problem(20), where=where, weigh=rule)
    agree(problem(20), where=where, weigh=rule, after=Multiply(torch.rand(20, 20)))
    if rule.has_lse:
        agree(problem(20), where=where, weigh=rule, return_lse=True)


@pytest.mark.parametrize("combine", ["sum", Mean(1e-3), Mean(), "weights"], ids=str)
def test_cells_that_combine(combine):
    extra = []
    if combine == "weights":
        extra = [torch.rand(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)]
        combine = Weights(*extra)
    where = selection(2, 4, combine=combine, once=False)
    agree(problem(20), extra, where=where)
    agree(problem(20), extra, where=where, weigh=ReLU())


def test_segments_and_mixtures():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, -1], [3, 3, 1, 1, 1, 1, 0, 0, -1, -1]])
    agree(problem(10), where=Segments(ids))
    agree(problem(10), where=Segments(ids) & Causal())
    agree(problem(20), where=selection(2, 4) | SlidingWindow(2, 2))


# ---- memory, dtype, determinism
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["neighborhood with dilation", "class tokens", "sinks | sliding window", "halo"]
)
def test_blocks_of_any_size_give_the_same(name, monkeypatch):
    where, n = PATTERNS[name]
    monkeypatch.setattr(fused, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(tiles, "LOGIT_BYTES", 3000)
    agree(problem(n), where=where, return_lse=True)
    agree(problem(n), where=where, score=ALiBi(torch.rand(4)))
    agree(problem(20), where=selection(2, 4), score=KeyBias(torch.randn(20)))
    with torch.no_grad():
        q, k, v = problem(n)
        for rule in (Softmax(), ReLU()):
            options = {"where": where, "weigh": rule, "score": SoftCap(5.0)}
            a, b = (attend(q, k, v, backend=name, **options) for name in ("tiles", "reference"))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def plainly(q, k, v, allowed):
    """Write the same mathematics in the dtype of q."""
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    return torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weigh", [None, "plain"])
def test_error_budget(dtype, weigh):
    where, n = Neighborhood((16, 16), 7), 256
    score = None if weigh is None else Bias(torch.zeros(1, requires_grad=True))
    exact = [t.detach().to(dtype).double().requires_grad_() for t in problem(n, hkv=4, d=16, d_v=16)]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    grad = torch.randn(2, 4, n, 16, generator=torch.Generator().manual_seed(2))
    truth = plainly(*exact, where.dense(n))
    rough = plainly(*low, where.dense(n))
    fast = attend(*low, where=where, score=score, backend="tiles")
    assert fast.dtype == dtype

    def error(x, y):
        return (x.double() - y).abs().max().item()

    assert error(fast, truth) <= 2 * error(rough, truth)
    wanted = torch.autograd.grad(truth, exact, grad.double())
    roughs = torch.autograd.grad(rough, low, grad.to(dtype))
    fasts = torch.autograd.grad(fast, low, grad.to(dtype))
    for a, b, c in zip(fasts, roughs, wanted, strict=True):
        assert error(a, c) <= 3 * error(b, c)


def test_half_precision_bias_keeps_its_digits():
    where = Neighborhood((8, 8), 5)
    q, k, v = problem(64, dtype=torch.bfloat16)
    bias = 100 + torch.rand(64)
    out = attend(q, k, v, where=where, score=KeyBias(bias), backend="tiles")
    truth = attend(q.double(), k.double(), v.double(), where=where, score=KeyBias(bias), backend="reference")
    assert (out.double() - truth).abs().max() < 0.03


def test_equal_calls_give_equal_bits():
    where = Neighborhood((20, 20), 7)
    first = results(problem(400, dtype=torch.float32), "tiles", where=where)
    again = results(problem(400, dtype=torch.float32), "tiles", where=where)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_inputs():
    q, k, v = problem(156, h=4, hkv=4)
    other = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    where = Neighborhood((12, 13), 5)
    for a, b in zip(
        results((q, k, v), "tiles", where=where), results(other, "tiles", where=where), strict=True
    ):
        torch.testing.assert_close(a, b)
    wide = [torch.randn(2, 4, 156, 16, dtype=torch.float64)[..., ::2].requires_grad_() for _ in range(3)]
    agree(wide, where=where)


def test_fully_masked_rows_are_zero_and_have_no_gradient():
    q, k, v = problem(156)
    mask = torch.ones(156, 156, dtype=torch.bool)
    mask[7] = False
    out, lse = attend(q, k, v, where=Neighborhood((12, 13), 5), mask=mask, return_lse=True, backend="tiles")
    assert (out[:, :, 7] == 0).all()
    assert (lse[:, :, 7] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 7] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 9, 4), (1, 2, 0, 4)])
def test_empty_problems(shape):
    x = torch.randn(shape, requires_grad=True)
    out, lse = attend(x, x, x, where=SlidingWindow(2), return_lse=True, backend="tiles")
    assert out.shape == shape
    assert lse.shape == shape[:3]
    out.sum().backward()
    assert x.grad is not None


def test_no_pair_at_all():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    out = attend(x, x, x, where=Explicit(torch.zeros(4, 4, dtype=torch.bool)), backend="tiles")
    assert (out == 0).all()
    out.sum().backward()
    assert (x.grad == 0).all()


def test_second_derivatives():
    q, k, v = problem(12, b=1, h=1, hkv=1, d=3, d_v=3)
    out = attend(q, k, v, where=SlidingWindow(3), backend="tiles")
    (g,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="reference"):
        torch.autograd.grad(g.sum(), q)

    def plain(q, k, v):  # ordinary autograd goes on
        return attend(q, k, v, where=SlidingWindow(3), weigh=Sigmoid(), backend="tiles")

    assert torch.autograd.gradcheck(plain, (q, k, v))
    assert torch.autograd.gradgradcheck(plain, (q, k, v))


def test_refusals():
    q, k, v = problem(20)
    with pytest.raises(UnsupportedError, match="every pair is needed"):
        attend(q, k, v, backend="tiles")
    where = selection(2, 4) | selection(2, 4, seed=5)
    with pytest.raises(UnsupportedError, match="Add must see all keys"):
        attend(q, k, v, where=where, after=Add(torch.ones(20, 20)), backend="tiles")
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda q: attend(q, q, q, where=SlidingWindow(2), backend="tiles"))(q[None])


META = {
    "masks per border": (Neighborhood((9, 10), 5), 90),
    "masks that turn out full": (Neighborhood((9, 10), 3, dilation=2), 90),
    "phantoms": (Halo((9, 10), 4, 2, border="zero"), 90),
    "specials": (with_specials(Neighborhood((9, 10), 3), 2), 92),
    "a table": (Explicit(torch.ones(20, 20) > 0), 20),
}


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", META)
def test_shapes_alone(name, learn):
    where, n = META[name]
    q = torch.empty(2, 4, n, 8, device="meta", requires_grad=learn)
    for score in (None, KeyBias(torch.empty(n, device="meta"))):
        out, lse = attend(q, q, q, where=where, score=score, backend="tiles", return_lse=True)
        assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", q.shape[:3])
        if learn:
            out.sum().backward()


def test_what_runs_fused():
    def phrase(**options):
        q, k, v = problem(20)
        return tiles.fusable(Problem.of(q, k, v, where=SlidingWindow(2), **options))

    assert phrase() is None
    assert phrase(score=RowFactor(torch.ones(4, 1, requires_grad=True))) is None
    assert phrase(score=KeyBias(torch.zeros(20))) is None
    assert "gradient" in phrase(score=KeyBias(torch.zeros(20, requires_grad=True)))
    assert "SoftCap" in phrase(score=SoftCap(1.0))
    assert "Sigmoid" in phrase(weigh=Sigmoid())
    assert "Dropout" in phrase(after=Dropout(0.1))
