"""torch.compile(fullgraph=True) and torch.export of attend with static patterns: no graph breaks."""

import pytest
import torch

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.specials import with_specials
from foveate.scores.bias import KeyBias
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Sigmoid, Softmax

WHERE = Neighborhood(Grid(8, 9), 3)

CASES = [
    ("tiles", {"where": WHERE}),
    ("tiles", {"where": WHERE, "weigh": Sigmoid()}),
    ("tiles", {"where": WHERE, "weigh": Softmax(sink=0.1), "return_lse": True}),
    ("tiles", {"where": with_specials(Neighborhood((7, 10), 3), 2)}),
    ("tiles", {"where": WHERE, "score": RelativeTable(torch.randn(2, 5, 5), Grid(8, 9))}),
    ("tiles", {"where": WHERE, "mask": torch.rand(72) > 0.3}),
    ("sdpa", {"where": WHERE}),
    ("sdpa", {"where": Causal()}),
    ("sdpa", {"where": WHERE, "score": KeyBias(torch.randn(72))}),
    ("reference", {"where": WHERE, "weigh": Sigmoid(), "score": KeyBias(torch.randn(72))}),
    ("auto", {"where": WHERE}),
    ("auto", {}),
]


def outputs_and_gradients(fn, tensors):
    out = fn(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    return [*outs, *torch.autograd.grad(sum((o * o).sum() for o in outs), tensors)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("backend", "options"), CASES, ids=lambda x: str(x)[:50])
def test_one_graph_forward_and_backward(backend, options):
    def fn(q, k, v):
        return attend(q * 1.5, k, v, backend=backend, **options)

    tensors = [torch.randn(1, 2, 72, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        outputs_and_gradients(compiled, tensors), outputs_and_gradients(fn, tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_pattern_is_another_graph():
    fn = torch.compile(
        lambda x, where: attend(x, x, x, where=where, backend="tiles"), backend="eager", fullgraph=True
    )
    x = torch.randn(1, 2, 72, 8)
    for where in (WHERE, Neighborhood(Grid(8, 9), 5), Halo((8, 9), 2, 1)):
        torch.testing.assert_close(fn(x, where), attend(x, x, x, where=where, backend="reference"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_other_lengths(backend):
    fn = torch.compile(
        lambda x: attend(x, x, x, where=Causal(), backend=backend), backend="eager", fullgraph=True
    )
    for b, n in ((1, 5), (1, 8), (2, 8), (3, 9), (4, 9)):
        x = torch.randn(b, 2, n, 8)
        torch.testing.assert_close(fn(x), attend(x, x, x, where=Causal(), backend="reference"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dynamic", [None, True], ids=["as it finds", "dynamic"])
def test_several_calls_of_changing_sizes_in_one_graph(dynamic):
    def fn(x, where):
        half = x[:, :, : x.shape[2] // 2]
        y = attend(x, half, half)
        y = attend(y, x, x, where=where)
        return attend(y, half, half, score=KeyBias(half[0, 0, :, 0]))

    compiled = torch.compile(fn, backend="eager", fullgraph=True, dynamic=dynamic)
    for b, n in ((1, 12), (2, 12), (3, 16), (3, 20)):
        x = torch.randn(b, 2, n, 8)
        torch.testing.assert_close(compiled(x, Causal()), fn(x, Causal()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_module_without_gradients():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            return attend(q, k, v, where=WHERE, backend="tiles").transpose(1, 2).flatten(2)

    block, x = Block(), torch.randn(3, 72, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_keeps_one_node():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, where=WHERE, backend="tiles")

    tensors = tuple(torch.randn(1, 2, 72, 8) for _ in range(3))
    exported = torch.export.export(Attend(), tensors)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names.count("foveate.tiles.default") == 1
    torch.testing.assert_close(exported.module()(*tensors), Attend()(*tensors))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor():
    def fn(q, k, v):
        return attend(q * 1.5, k, v, where=WHERE, backend="tiles") + 1

    tensors = [torch.randn(1, 2, 72, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(fn, fullgraph=True)
    for a, b in zip(
        outputs_and_gradients(compiled, tensors), outputs_and_gradients(fn, tensors), strict=True
    ):
        torch.testing.assert_close(a, b)
