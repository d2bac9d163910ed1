import pytest
import torch

from foveate.core.errors import UnsupportedError, bad
from foveate.core.grid import Grid
from foveate.core.registry import Facts
from foveate.kernels.attend import attend
from foveate.measure.subject import Subject
from foveate.measure.timer import time_interleaved
from foveate.patterns.basic import SlidingWindow
from tests.measure.toys import ToyAttention, gate_toy, toy


def test_layouts_are_inverse_and_samples_repeat():
    for subject in (toy(), gate_toy()):
        x = subject.sample(2, seed=3)
        assert torch.equal(x, subject.sample(2, seed=3))
        assert not torch.equal(x, subject.sample(2, seed=4))
        assert subject.tokens(x).shape == (2, 20, 8)
        assert torch.equal(subject.arrange(subject.tokens(x)), x)
        assert subject(x).shape == x.shape


def test_both_layouts_see_the_same_numbers():
    assert torch.equal(toy().sample(seed=1), gate_toy().tokens(gate_toy().sample(seed=1)))


def test_builds_through_for_workload_and_hands_reasons_on():
    class Mech(ToyAttention):
        @classmethod
        def for_workload(cls, *, dim, grid, heads, causal=False):
            if grid.ndim != 2:
                raise bad("grid", grid, "two axes")
            return cls(dim, radius=heads, causal=causal)

    facts = Facts(key="m", title="", arxiv="", year=2020, family="local", role="pattern", cost="N", cls=Mech)
    subject = Subject.build(facts, dim=8, grid=Grid(3, 3), heads=2, causal=True)
    assert (subject.module.radius, subject.module.causal, subject.key) == (2, True, "m")
    assert subject.params == 8 * 24 + 24 + 8 * 8 + 8
    with pytest.raises(ValueError, match="two axes"):
        Subject.build(facts, dim=8, grid=Grid(9), heads=2)


def test_timed_calls_run_and_leave_no_graph():
    subject = toy()
    x = subject.sample(2)
    found = time_interleaved({"f": subject.forward_call(x), "b": subject.backward_call(x)}, max_repeats=3)
    assert not found.errors
    assert all(t.median_ms > 0 for t in found.times.values())
    subject.step(x)
    assert all(p.grad is None for p in subject.module.parameters())
    assert x.grad is None


def test_backend_is_asked_for_and_restored():
    subject = toy()
    with subject.backend("reference") as has:
        assert has
        assert subject.module.backend == "reference"
    assert subject.module.backend == "auto"
    with gate_toy().backend("reference") as has:
        assert not has


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backend = "auto"

    def forward(self, x, grid):
        x = x[:, None]
        return attend(x, x, x, where=SlidingWindow(3), backend=self.backend)[:, 0]


def test_backends_are_those_that_ran():
    subject = Subject("attends", Attends(), Grid(64), 8, "tokens")
    x = subject.sample()
    with subject.backend("reference"):
        assert subject.backends(x) == ["reference"]
    found = time_interleaved({"tiles": subject.forward_call_on(x, "tiles")}, max_repeats=3)
    assert not found.errors
    assert subject.module.backend == "auto"
    bare = gate_toy()
    assert bare.backends(bare.sample()) == []
    with pytest.raises(UnsupportedError, match="no part of"):
        bare.forward_call_on(bare.sample(), "tiles").run()
