"""The operators `foveate::cpu`: opcheck, one node in compiled and exported graphs, and what they check themselves."""

import pytest
import torch
from torch.library import opcheck

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.cpu import backend
from foveate.kernels.cpu.job import Call
from foveate.kernels.cpu.op import attend_cells_backward_op, attend_cells_op
from foveate.kernels.flops import count_flops
from foveate.kernels.problem import Problem
from foveate.kernels.select import plan
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.scores.bias import Gathered, KeyBias
from foveate.scores.distance import ALiBi
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Sigmoid, Softmax
from foveate.scores.temperature import RowFactor, SoftCap

GRID = Grid(8, 9)
WHERE = Neighborhood(GRID, 3)
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def routed():
    ids = torch.stack([torch.randperm(72) for _ in range(4)]).view(2, 2, 6, 12)
    return Selection(ids, ids.flip(2), torch.rand(2, 2, 6, 12, 12) > 0.3, n_q=72, n_k=72)


def call_of(grad=True, dtype=torch.float32, layout=False, **options):
    """Return the arguments with which `attend` would call the operator."""
    shape = (2, 72, 2, 16) if layout else (2, 2, 72, 16)
    qkv = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    qkv = [x.transpose(1, 2) if layout else x for x in qkv]
    q, k, v = (x.requires_grad_(grad) for x in qkv)
    found = []
    problem = Problem.of(q, k, v, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "attend_cells", lambda call: found.append(call) or (None, None))
        backend.run(problem, plan(problem, "cpu"))
    call = found[0]
    leaf = [None if x is None else x.detach().requires_grad_(grad) for x in (call.factor, call.sink)]
    tables = [t.detach().requires_grad_(grad) for t in call.tables]
    return call._replace(factor=leaf[0], sink=leaf[1], tables=tables)


def options_of(name):
    return {
        "plain": {"where": WHERE},
        "everything": {
            "where": WHERE,
            "score": RowFactor(torch.rand(2, 1)) + RelativeTable(torch.randn(2, 5, 5), GRID) + KeyBias(torch.randn(72)),
            "weigh": Softmax(sink=torch.zeros(2)),
        },
        "sigmoid": {"where": WHERE, "weigh": Sigmoid(-1.0), "score": SoftCap(3.0)},
        "routed": {"where": routed()},
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "everything", "sigmoid", "routed"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(name):
    opcheck(attend_cells_op, tuple(call_of(**options_of(name))), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_without_gradients_in_another_layout(dtype):
    call = call_of(False, dtype, True, **options_of("everything"))
    opcheck(attend_cells_op, tuple(call), test_utils=CHECKS[:2])


def test_opcheck_of_the_backward():
    call = call_of(False, **options_of("everything"))
    call = call._replace(
        cells=call_of(True, where=WHERE).cells, spec=call_of(True, **options_of("everything")).spec
    )
    out, lse = attend_cells_op(*call)
    args = (torch.randn_like(out), torch.randn_like(lse), out, lse, *call, [1] * (4 + len(call.tables)))
    opcheck(attend_cells_backward_op, args, test_utils=CHECKS[:2])


def test_the_operator_and_the_eager_way_agree():
    call = call_of(**options_of("everything"))
    inputs = [call.q, call.k, call.v, call.factor, call.sink, *call.tables]
    found = []
    for way in (lambda: attend_cells_op(*call), lambda: backend.attend_cells(call)):
        out, lse = way()
        found.append([out, lse, *torch.autograd.grad((out * out).sum() + (lse * lse).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_only_the_wanted_gradients():
    q, k, v = (torch.randn(1, 2, 72, 8) for _ in range(3))
    every = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(attend(*every, where=WHERE, backend="cpu").square().sum(), every)
    for i in range(3):
        some = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        (got,) = torch.autograd.grad(attend(*some, where=WHERE, backend="cpu").square().sum(), some[i])
        assert torch.equal(got, want[i])
    bias = torch.zeros(72, requires_grad=True)
    attend(q, k, v, where=WHERE, score=KeyBias(bias), backend="cpu").square().sum().backward()
    assert bias.grad.abs().sum() > 0


def test_the_lse_alone_has_a_gradient():
    q, k, v = (torch.randn(1, 2, 72, 8, requires_grad=True) for _ in range(3))
    found = []
    for name in ("cpu", "reference"):
        _, lse = attend(q, k, v, where=WHERE, return_lse=True, backend=name)
        found.append(torch.autograd.grad(lse.square().sum(), (q, k)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", [WHERE, routed()], ids=["static", "routed"])
def test_flops_are_counted(where):
    q, k, v = (torch.randn(2, 2, 72, 8, requires_grad=True) for _ in range(3))
    chosen = plan(Problem.of(q, k, v, where=where), "cpu")

    def call():
        attend(q, k, v, where=where, backend="cpu").sum().backward()

    assert count_flops(call) == chosen.flops + chosen.flops_backward


BROKEN = {
    "k": lambda c: c._replace(q=c.q[..., :12]),
    "v": lambda c: c._replace(v=c.v[:, :, :-1]),
    "tables": lambda c: c._replace(tables=[t.double() for t in c.tables]),
    "codes": lambda c: c._replace(codes=[c.codes[0], c.codes[1][:-1], *c.codes[2:]]),
    "factor": lambda c: c._replace(factor=c.factor[..., :-1]),
    "sink": lambda c: c._replace(sink=c.sink[:1]),
    "cells.own": lambda c: c._replace(cells=[*c.cells[:2], c.cells[2] + 1, *c.cells[3:]]),
    "cells.runs": lambda c: c._replace(cells=[*c.cells[:11], c.cells[11] + 1, *c.cells[12:]]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_operator_checks_what_it_is_given(name):
    call = call_of(**options_of("everything"))
    with pytest.raises(ArgumentError, match=name.replace(".", r"\.")):
        attend_cells_op(*BROKEN[name](call))


def test_a_gradient_that_was_not_prepared():
    call = call_of(False, where=WHERE)
    call = Call(*[x.requires_grad_() if i < 3 else x for i, x in enumerate(call)])
    out, _ = attend_cells_op(*call)
    with pytest.raises(ArgumentError, match="requires_grad=True"):
        out.sum().backward()


# ---- compiled -------------------------------------------------------------------------------------------------------

COMPILED = {
    "plain": {"where": WHERE},
    "sigmoid": {"where": WHERE, "weigh": Sigmoid()},
    "sink and lse": {"where": WHERE, "weigh": Softmax(sink=0.1), "return_lse": True},
    "specials": {"where": with_specials(Neighborhood((7, 10), 3), 2)},
    "table": {"where": WHERE, "score": RelativeTable(torch.randn(2, 5, 5, requires_grad=True), GRID)},
    "alibi": {"where": WHERE, "score": ALiBi(torch.rand(2))},
    "mask": {"where": WHERE, "mask": torch.rand(72) > 0.3},
    "factor, bias, cap": {
        "where": WHERE,
        "score": RowFactor(torch.rand(2, 1)) + KeyBias(torch.randn(72)) + SoftCap(2.0),
    },
    "gathered": {
        "where": WHERE,
        "score": Gathered(torch.randn(1, 2, 72, 15), lambda q, k: k[0] - q[0] + 7, grid=GRID),
    },
    "phantoms": {"where": Halo((8, 9), 4, 1, border="zero")},
    "clipped": {
        "where": Halo((8, 9), 4, 1, border="zero"),
        "score": Gathered(torch.randn(1, 2, 72, 6), lambda q, k: k[1] - q[1] + 3, grid=GRID, clip=True),
    },
}  # fmt: skip


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_forward_and_backward(name):
    tensors = [torch.randn(1, 2, 72, 8, requires_grad=True) for _ in range(3)]

    def fn(q, k, v):
        return attend(q * 1.5, k, v, backend="cpu", **COMPILED[name])

    found = []
    for way in (torch.compile(fn, backend="aot_eager", fullgraph=True), fn):
        out = way(*tensors)
        outs = out if isinstance(out, tuple) else (out,)
        found.append([*outs, *torch.autograd.grad(sum((o * o).sum() for o in outs), tensors)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_shapes_and_auto():
    fn = torch.compile(lambda x, w: attend(x, x, x, where=w), backend="eager", fullgraph=True)
    for b, where in (
        (1, WHERE),
        (2, WHERE),
        (3, Neighborhood(Grid(9, 9), 3)),
        (3, Neighborhood(Grid(40, 40), 5)),
    ):
        x = torch.randn(b, 2, where.lengths(None, None)[0], 8)
        torch.testing.assert_close(fn(x, where), attend(x, x, x, where=where))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_keeps_one_node():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, where=WHERE, backend="cpu")

    tensors = tuple(torch.randn(1, 2, 72, 8) for _ in range(3))
    exported = torch.export.export(Attend(), tensors)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names.count("foveate.cpu.default") == 1
    assert torch.equal(exported.module()(*tensors), Attend()(*tensors))
