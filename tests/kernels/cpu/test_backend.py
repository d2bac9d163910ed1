"""Backend cpu against the definition: every family, dtype, feature and instruction set, within the error budgets."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.cpu import backend as core
from foveate.kernels.cpu.library import forced_isa, isa_levels
from foveate.kernels.cpu.op import attend_cells
from foveate.patterns.basic import BlockList, Causal, Explicit, Full, Sinks, SlidingWindow
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from foveate.patterns.groups import ExplicitGroup
from foveate.patterns.schedule import Schedule
from foveate.patterns.segments import Segments
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.patterns.subsample import Subsampled
from foveate.scores.after import Dropout
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.distance import ALiBi
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import ReLU, Sigmoid, Softmax
from foveate.scores.temperature import RowFactor, SoftCap
from tests.kernels.cpu.cases import DTYPES, LAYOUTS, Case, cases, check, gradients, outputs, tensors

LEVELS = isa_levels()

PATTERNS = {
    "neighborhood": (Neighborhood((12, 13), 5), 156),
    "neighborhood with dilation": (Neighborhood((21, 24), 5, dilation=(3, 2)), 504),
    "neighborhood 3-d, strided": (Neighborhood((5, 6, 7), 3, stride=2), 210),
    "neighborhood, causal axes": (Neighborhood((9, 17), 3, causal=(True, False)), 153),
    "windows, shifted": (Windows((14, 14), 4, shift=2), 196),
    "halo": (Halo((15, 12), 4, 2), 180),
    "halo with phantoms": (Halo((15, 12), 4, 2, border="zero"), 180),
    "lattice": (Lattice((12, 12), 3), 144),
    "causal": (Causal(), 137),
    "sliding window": (SlidingWindow(7, 2), 197),
    "full": (Full(), 70),
    "class tokens": (with_specials(Neighborhood((12, 13), 5), 3), 159),
    "isolated tokens": (with_specials(Neighborhood((6, 7), 3), 2, rule="isolated"), 44),
    "many specials": (with_specials(Neighborhood((6, 7), 3), 70), 112),
    "sinks | sliding window": (Sinks(3) | SlidingWindow(5), 60),
    "neighborhood & causal": (Neighborhood((8, 9), 5) & Causal(), 72),
    "rows without a key": (Explicit(torch.arange(90)[:, None] % 3 > torch.arange(90)), 90),
    "block list": (BlockList(8, ((0, 1), (2, 0), (2, 2), (3, 1))), 29),
    "large blocks": (BlockList(80, ((0, 1), (1, 0), (1, 2))), 211),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_at_every_level(name, level):
    where, n = PATTERNS[name]
    dtype = DTYPES[list(PATTERNS).index(name) % 3]
    with forced_isa(level):
        check(Case(tensors(n, hkv=2, dtype=dtype), dtype, {"where": where}))
        check(Case(tensors(n, d=40, d_v=24), options={"where": where, "return_lse": True}))


@given(case=cases(), data=st.data())
def test_any_call(case, data):
    with forced_isa(data.draw(st.sampled_from(LEVELS))):
        check(case)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 24, 64, 136, 256])
def test_head_sizes(d, dtype, level):
    with forced_isa(level):
        for d_v in (d, 264 - d):
            qkv = tensors(100, d=d, d_v=d_v, h=2, hkv=1, dtype=dtype)
            check(Case(qkv, dtype, {"where": Neighborhood((10, 10), 5)}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    check(Case(tensors(72, hkv=2, dtype=dtype), dtype, {"where": Neighborhood((8, 9), 3)}, layout=layout))


def test_the_output_has_the_layout_of_the_queries():
    q, k, v = (t.float().transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(72))
    out = attend(q, k, v, where=Neighborhood((8, 9), 3), backend="cpu")
    assert out.transpose(1, 2).is_contiguous()


def test_broadcast_batch_and_expanded_gradients():
    q, k, v = (t.float() for t in tensors(72))
    one = [q[:1].requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    where = Neighborhood((8, 9), 3)
    for x, y in zip(
        *(torch.autograd.grad(attend(*one, where=where, backend=b).sum(), one) for b in ("cpu", "reference")),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_large_logits():
    q, k, v = tensors(72)
    check(Case([100 * q, k, v], options={"where": Neighborhood((8, 9), 3), "return_lse": True}))


# ---- routed cells -------------------------------------------------------------------------------------------------


def routed(*lead, n=192, cells=6, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    sets = max(1, lead[0] * lead[1])
    ids = torch.stack([torch.randperm(n, generator=g) for _ in range(sets)]).view(*lead, cells, -1)
    return Selection(ids, ids.flip(2), n_q=n, n_k=n, **options)


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("hkv", [4, 2, 1])
def test_routed_cells(lead, hkv):
    check(Case(tensors(192, hkv=hkv), options={"where": routed(*lead), "return_lse": True}))


def test_keys_that_heads_share_are_copied_for_gradients_only(monkeypatch):
    calls = []
    monkeypatch.setattr(core, "attend_cells", lambda call: calls.append(call) or attend_cells(call))
    q, k, v = (t.float() for t in tensors(192, hkv=2))
    plain = attend(q, k, v, where=routed(2, 4), backend="cpu")
    traced = attend(q.requires_grad_(), k, v, where=routed(2, 4), backend="cpu")
    assert [call.k.shape[1] for call in calls] == [2, 4]
    assert plain.equal(traced)


def test_a_query_in_several_cells():
    where = routed(2, 4) | SlidingWindow(3, 3)
    assert not where.schedule.is_single_cell
    check(Case(tensors(192), options={"where": where, "return_lse": True}))
    check(Case(tensors(192, hkv=2), options={"where": where, "weigh": Sigmoid(-2.0)}))


def test_packed_sequences():
    ids = torch.tensor([[0] * 30 + [1] * 50 + [-1] * 20, [2] * 90 + [3] * 5 + [-1] * 5])
    check(Case(tensors(100), options={"where": Segments(ids), "return_lse": True}))
    check(Case(tensors(100), options={"where": Segments(ids) & Causal()}))


# ---- exactness ------------------------------------------------------------------------------------------------------


def full_call(where, n, score=True):
    g = torch.Generator().manual_seed(3)
    qkv = [t.float().requires_grad_() for t in tensors(n, hkv=2)]
    table = torch.randn(4, 9, 9, generator=g, requires_grad=True)
    bias = torch.randn(n, generator=g, requires_grad=True)
    sink = torch.randn(4, generator=g, requires_grad=True)
    rows = torch.rand(4, 1, generator=g, requires_grad=True)
    parts = [RowFactor(rows), RelativeTable(table, Grid(20, 21)), KeyBias(bias)] if score else []
    options = {"where": where, "score": parts, "weigh": Softmax(sink=sink), "return_lse": True}
    outs = outputs(attend(*qkv, backend="cpu", **options))
    extra = [table, bias, sink, rows] if score else [sink]
    return [*outs, *gradients(outs, [*qkv, *extra])]


@pytest.mark.parametrize("level", LEVELS)
def test_any_number_of_threads_gives_the_same_bits(level):
    before = torch.get_num_threads()
    try:
        with forced_isa(level):
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(
                    full_call(Neighborhood((20, 21), 5), 420) + full_call(routed(2, 4, n=420), 420, False)
                )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_concurrent_calls():
    wheres = [Neighborhood((20, 21), w) for w in (3, 5, 7)] * 4
    alone = [full_call(w, 420) for w in wheres[:3]] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: full_call(w, 420), wheres))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_without_a_key_are_zero_and_have_no_gradient():
    q, k, v = (t.float().requires_grad_() for t in tensors(156))
    mask = torch.ones(156, 156, dtype=torch.bool)
    mask[7] = False
    where = Neighborhood((12, 13), 5)
    out, lse = attend(q, k, v, where=where, mask=mask, return_lse=True, backend="cpu")
    assert (out[:, :, 7] == 0).all()
    assert (lse[:, :, 7] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 7] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (1, 2, 0, 8), (1, 0, 9, 8)])
def test_empty_problems(shape):
    x = torch.randn(shape, requires_grad=True)
    out, lse = attend(x, x, x, where=SlidingWindow(2), return_lse=True, backend="cpu")
    assert out.shape == shape
    assert lse.shape == shape[:3]
    out.sum().backward()
    assert x.grad is not None


def test_no_pair_at_all():
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    nothing = Explicit(torch.zeros(4, 4, dtype=torch.bool))
    out, lse = attend(x, x, x, where=nothing, backend="cpu", weigh=Softmax(sink=0.5), return_lse=True)
    assert (out == 0).all()
    assert (lse == 0.5).all()
    out.sum().backward()
    assert (x.grad == 0).all()


def test_keys_of_length_zero():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    out, lse = attend(q, k, k, where=Full(), backend="cpu", return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# ---- refusals -------------------------------------------------------------------------------------------------------


def bad_selection(q=None, k=None):
    ids = torch.arange(20).view(1, 1, 2, 10)
    return Selection(ids if q is None else q, ids if k is None else k, n_q=20, n_k=20)


@pytest.mark.parametrize("value", [20, 1 << 40, -2])
@pytest.mark.parametrize("side", ["q", "k"])
def test_wrong_ids_raise_and_touch_nothing(value, side):
    ids = torch.arange(20).view(1, 1, 2, 10).clone()
    ids[0, 0, 1, 3] = value
    x = torch.randn(1, 1, 20, 8)
    where = bad_selection(**{side: ids})
    with pytest.raises(ArgumentError, match=rf"{side}_ids"):
        attend(x, x, x, where=where.schedule, backend="cpu")


def test_a_group_that_lies_about_its_lengths():
    group = ExplicitGroup(torch.arange(20).view(1, 1, 1, 20), torch.arange(30).view(1, 1, 1, 30))
    x = torch.randn(1, 1, 20, 8)
    with pytest.raises(ArgumentError, match="k_ids"):
        attend(x, x, x, where=Schedule(20, 20, (group,)), backend="cpu")


W20 = SlidingWindow(3)
ONES = torch.ones(20)
REFUSED = {
    "left to torch's SDPA": {},
    "not in float64": {"where": W20, "dtype": torch.float64},
    "not both 256 at most": {"where": W20, "d": 264},
    "not by ReLU": {"where": W20, "weigh": ReLU()},
    "Dropout changes the weights": {"where": W20, "after": Dropout(0.5)},
    "multiplies first": {"where": W20, "score": KeyBias(ONES) + RowFactor(ONES)},
    "KeyBias comes after SoftCap": {"where": W20, "score": SoftCap(1.0) + KeyBias(ONES)},
    "mask comes after SoftCap": {"where": W20, "score": SoftCap(1.0), "mask": ONES > 0},
    "bias of Sigmoid is a tensor": {"where": W20, "score": SoftCap(1.0), "weigh": Sigmoid(torch.ones(2))},
    "5 biases": {"where": W20, "score": [KeyBias(ONES)] * 5},
    "not a linear form": {
        "where": W20,
        "score": Gathered(torch.ones(1, 1, 20, 20), lambda q, k: (k[0] - q[0]).abs()),
    },
    "leaves the table": {
        "where": W20,
        "score": Gathered(torch.ones(1, 1, 20, 20), lambda q, k: k[0] - q[0] + 5),
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason):
    options = dict(REFUSED[reason])
    x = torch.randn(1, 2, 20, options.pop("d", 8), dtype=options.pop("dtype", torch.float32))
    with pytest.raises(UnsupportedError, match=f"(?i){reason}"):
        attend(x, x, x, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rows", [5, 15])
def test_rows_of_queries_with_phantom_keys(rows, stride, dtype):
    grid = Grid(9, 11)
    where = Halo(grid, 4, 2, border="zero")
    where = where if stride == 1 else Subsampled(where, stride)
    n = where.lengths(None, None)[0]
    asks = grid if stride == 1 else where.query_grid
    g = torch.Generator().manual_seed(5)
    extra = [torch.randn(2, 4, n, rows, generator=g).requires_grad_() for _ in range(2)]
    score = [
        Gathered(u, lambda q, k, a=a: k[a] - stride * q[a] + rows // 2, grid=grid, query_grid=asks, clip=True)
        for a, u in enumerate(extra)
    ]
    check(Case(tensors(n, n_k=99, dtype=dtype), dtype, {"where": where, "score": score}, extra))


DENSE = {
    "relative table": lambda: {"score": RelativeTable(torch.randn(2, 7, 9, requires_grad=True), Grid(4, 5))},
    "sigmoid": lambda: {"weigh": Sigmoid(-1.0)},
    "sink": lambda: {"weigh": Softmax(sink=torch.randn(2))},
    "row factor": lambda: {"score": RowFactor(torch.rand(1, 2, 20))},
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_attention_with_scores(name):
    options = DENSE[name]()
    inputs = [t.float().requires_grad_() for t in tensors(20, h=2, hkv=2)]
    found = []
    for backend in ("cpu", "reference"):
        out = attend(*inputs, backend=backend, **options)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_unknown_scores_are_refused_by_name():
    class Mine(Bias):
        pass

    x = torch.randn(1, 2, 20, 8)
    with pytest.raises(UnsupportedError, match="does not know Mine"):
        attend(x, x, x, where=W20, score=Mine(torch.ones(20, 20)), backend="cpu")


def test_transforms_are_refused():
    x = torch.randn(3, 1, 2, 20, 8)
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda q: attend(q, q, q, where=W20, backend="cpu"))(x)
    assert torch.vmap(lambda q: attend(q, q, q, where=W20))(x).shape == x.shape


def test_second_derivatives_are_refused():
    q, k, v = (t.float().requires_grad_() for t in tensors(20))
    out = attend(q, k, v, where=W20, backend="cpu")
    (g,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="reference"):
        torch.autograd.grad(g.sum(), q)


def test_explain_names_the_instruction_set():
    shape = (1, 8, 4096, 64)
    where = Neighborhood((64, 64), 13)
    for dtype, name in ((torch.float32, LEVELS[-1].removesuffix(" BF16")), (torch.bfloat16, LEVELS[-1])):
        text = str(explain(shape, shape, shape, where=where, dtype=dtype, backend="cpu"))
        assert f"cpu ({name}, {torch.get_num_threads()} threads)" in text
    with forced_isa("portable"):
        assert "cpu (portable" in str(explain(shape, shape, shape, where=where))
    other = explain(shape, shape, shape, where=where, score=ALiBi(torch.rand(8)), weigh=ReLU())
    assert other.backend == "tiles"
    assert "not by ReLU" in other.reasons["cpu"]
    bound = explain(shape, shape, shape, where=where)
    assert bound.speedup_bound_backward == pytest.approx(bound.speedup_bound * 7 / 9)


def test_auto_takes_the_core():
    x = torch.randn(1, 8, 1024, 32)
    where = Neighborhood((32, 32), 7)
    assert torch.equal(attend(x, x, x, where=where), attend(x, x, x, where=where, backend="cpu"))
