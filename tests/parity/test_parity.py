"""Every golden file against our implementation, and the runner against itself."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.parity.ledger import LEDGER, Entry, find
from tests.parity.rules import violations
from tests.parity.runner import adapter_for, check, check_file, compare, golden_files, split_files
from tests.parity.vector import Vector, _split, read

DONE, MISSING = split_files()
ADAPTERS = sorted((Path(__file__).parent / "adapters").glob("*.py"))


@pytest.mark.parametrize("path", DONE, ids=lambda p: p.name.removesuffix(".safetensors"))
def test_equal_to_the_authors_code(path):
    failures = check_file(path)
    assert not failures, "\n".join(failures)


def test_every_golden_file_is_checked_or_listed():
    assert len(DONE) + len(MISSING) == len(golden_files())
    assert all(adapter_for(path) is None for path in MISSING)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: p.stem)
def test_adapters_only_rename_reshape_and_configure(path):
    assert not violations(path.read_text())


def test_ledger_entries_are_still_needed():
    for entry in LEDGER:
        without = tuple(e for e in LEDGER if e is not entry)
        concerned = [
            path
            for path in DONE
            for vector in read(path)
            if any(find(vector.name, name, vector.config, (entry,)) for name in vector.tensors)
        ]
        label = f"{entry.vector}: {entry.tensor}"
        assert concerned or entry.applies is not None, f"{label} concerns no vector: remove it"
        for path in concerned:
            assert check_file(path, without), f"{path.name} holds without {label}: remove it"


# The runner itself, on a made-up system: out = scale * x @ weight^T.


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.inner(x) * 2


def made_up(**changes) -> Vector:
    x, weight, cotangent = torch.randn(4, 3), torch.randn(3, 2), torch.randn(4, 2)
    tensors = {
        "in.x": x,
        "param.lin.weight": weight,
        "cotangent": cotangent,
        "out": 2 * x @ weight,
        "out.index": torch.arange(3),
        "grad.in.x": 2 * cotangent @ weight.T,
        "grad.param.lin.weight": 2 * x.T @ cotangent,
        "mask.seen": torch.tensor([0.0, -100.0]),
    } | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    return Vector(key="made_up", part="", case="", config={}, call="", notes="", tensors=tensors)


def adapter(vector):
    module = Scaled()
    weight = vector.param("lin.weight").transpose(0, 1)
    vector.load(module, given={"inner.weight": weight})
    return {
        "out": module(vector.input("x")),
        "out.index": torch.arange(3),
        "mask.seen": torch.tensor([True, False]),
    }


def test_a_right_adapter_holds():
    assert check(made_up(), adapter) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(4, 2)}, "out differs by"),
        ({"out": torch.zeros(4, 3)}, "out is 4x2, expected 4x3"),
        ({"out": torch.full((4, 2), torch.nan)}, "NaN or infinity"),
        ({"out.index": torch.tensor([0, 1, 3])}, "out.index differs in 1 of 3"),
        ({"out.index": torch.arange(3.0)}, "out.index is torch.int64"),
        ({"mask.seen": torch.zeros(2)}, "mask.seen differs in 1 of 2"),
        ({"grad.in.x": torch.zeros(4, 3)}, "grad.in.x differs by"),
        ({"grad.param.lin.weight": torch.zeros(3, 2)}, "grad.param.lin.weight differs by"),
        ({"out.more": torch.zeros(1)}, "out.more was not compared"),
        ({"init.lin.weight": torch.zeros(1)}, "init.lin.weight was not compared"),
        ({"grad.in.y": torch.zeros(1)}, "grad.in.y was not compared"),
        ({"grad_official.in.y": torch.zeros(1)}, "grad_official.in.y was not compared"),
        ({"in.y": torch.zeros(1)}, "in.y was not used"),
        ({"aux.draw": torch.zeros(1)}, "aux.draw was not used"),
        ({"param.lin.bias": torch.zeros(2)}, "param.lin.bias was not used"),
        ({"tables": torch.zeros(1)}, "tables was not used"),
        ({"cotangent": None}, "grad.in.x differs by"),
        ({"cotangent.more": torch.zeros(1)}, "cotangent.more belongs to out.more"),
    ],
)
def test_everything_else_fails(changes, message):
    failures = check(made_up(**changes), adapter)
    assert any(message in failure for failure in failures), failures


def test_an_output_the_file_does_not_hold_fails():
    failures = check(made_up(), lambda v: {**adapter(v), "out.atn": torch.zeros(1)})
    assert "which the file does not hold" in failures[0]


def test_a_parameter_without_a_place_fails():
    with pytest.raises(KeyError, match=r"nothing loads into \['inner.weight'\]"):
        check(made_up(), lambda v: v.load(Scaled()))
    with pytest.raises(ValueError, match=r"inner\.weight is"):
        check(made_up(), lambda v: v.load(Scaled(), rename={"lin": "inner"}))


def test_gradients_get_five_times_the_tolerance():
    b = torch.ones(1)
    assert compare("out", b + 5e-5, b)
    assert compare("grad.in.x", b + 5e-5, b) is None
    assert compare("grad.in.x", b + 5e-4, b)


def test_ledger_loosens_or_excuses_one_tensor_only():
    wrong = made_up(out=torch.zeros(4, 2))
    entry = Entry(vector="made_up", tensor="out", reason="a test")
    assert check(wrong, adapter, (entry,)) == []
    assert check(made_up(out=torch.zeros(4, 2)), adapter, (Entry(vector="other", tensor="out", reason=""),))
    off = made_up()
    off.tensors["out"] = off.tensors["out"] * 1.0002
    assert check(off, adapter, (Entry(vector="made_up", tensor="out", reason="", factor=20.0),)) == []


def test_cases_are_split_whichever_word_stands_first():
    config = {"one": {"n": 1}, "one_b": {"n": 2}}
    names = ["in.one.x", "in.one_b.x", "grad.in.one_b.x", "out.one", "one_b.out.lse", "cotangent.one"]
    cases = {c: (o, sorted(t)) for c, o, t in _split(config, dict.fromkeys(names, torch.zeros(1)))}
    assert cases["one"] == ({"n": 1}, ["cotangent", "in.x", "out"])
    assert cases["one_b"] == ({"n": 2}, ["grad.in.x", "in.x", "out.lse"])


@pytest.mark.parametrize(
    "source",
    [
        "y = module(x) * 2",
        "y = -module(x)",
        "y = x.softmax(-1)",
        "y = torch.relu(x)",
        "import numpy",
        "from torch.nn import functional",
        "from torch import einsum",
        "x += 1",
        "y = x @ w",
    ],
)
def test_rules_refuse_computation(source):
    assert violations(source)


def test_rules_allow_reshapes_and_configuration():
    source = """
from torch import Tensor
from foveate.core.grid import Grid

def part(vector):
    config = vector.config
    heads = config["heads"]
    size = config["dim"] // heads
    x = vector.input("x").reshape(2, size * heads, -1)[:, 1:].permute(0, 2, 1)
    table = vector.param("table").reshape(2 * config["m"] - 1, -1)
    return {"out": x.flatten(0, 1), f"out.{size}": x.transpose(0, 1)} | {"mask": x}
"""
    assert violations(source) == []
