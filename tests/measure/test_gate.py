import pytest
import torch

from foveate.core.grid import Grid
from foveate.measure.gate import causality_probe, check_mechanism
from tests.measure.toys import BatchAttention, BrokenAttention, NanAttention, ToyAttention, gate_toy, toy


def red(gate):
    return [check.name for check in gate.checks if not check.ok]


def test_a_right_mechanism_is_green():
    for build in (toy, gate_toy, lambda: toy(radius=2)):
        gate = check_mechanism(build)
        assert gate.ok, gate.reason
        assert gate.reason == ""
        assert {c.name for c in gate.checks} == {
            "shape",
            "finite",
            "output_budget",
            "gradient_budget",
            "batch",
        }


def test_an_error_of_a_thousandth_is_red():
    gate = check_mechanism(lambda: toy(BrokenAttention))
    assert "output_budget" in red(gate)
    assert "gradient_budget" in red(gate)
    assert "output" in gate.reason


def test_a_wrong_gradient_alone_is_red():
    class WrongGradient(ToyAttention):
        def noise(self, y):
            return y.detach() * 0.5 + y * 0.5

    assert red(check_mechanism(lambda: toy(WrongGradient))) == ["gradient_budget"]


def test_a_lost_gradient_is_red():
    class Lost(ToyAttention):
        def forward(self, x, grid):
            return super().forward(x.detach() if self.backend == "auto" else x, grid)

    assert "gradient_budget" in red(check_mechanism(lambda: toy(Lost)))


def test_nan_is_red_and_an_exception_too():
    assert "finite" in red(check_mechanism(lambda: toy(NanAttention)))

    class Raises(ToyAttention):
        def forward(self, x, grid):
            raise RuntimeError("kernel exploded")

    gate = check_mechanism(lambda: toy(Raises))
    assert red(gate) == ["runs"]
    assert "kernel exploded" in gate.reason


def test_batch_mixing_is_red_unless_declared():
    assert red(check_mechanism(lambda: toy(BatchAttention))) == ["batch"]
    assert check_mechanism(lambda: toy(BatchAttention), batch_coupled=True).ok


def test_wrong_shape_is_red():
    class Short(ToyAttention):
        def forward(self, x, grid):
            return super().forward(x, grid)[:, :-1]

    assert "shape" in red(check_mechanism(lambda: toy(Short))) or "runs" in red(
        check_mechanism(lambda: toy(Short))
    )


@pytest.mark.parametrize("radius", [None, 3])
def test_causality_probe_sees_the_future(radius):
    honest = toy(grid=Grid(24), radius=radius, causal=True)
    cheat = toy(grid=Grid(24), radius=radius)
    assert causality_probe(honest).ok
    found = causality_probe(cheat)
    assert not found.ok
    assert "moves earlier outputs" in found.sentence


def test_causality_probe_sees_a_peek_of_one_token():
    class Peek(ToyAttention):
        def forward(self, x, grid):
            nxt = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)
            return super().forward(x, grid) + 0.01 * nxt

    assert not causality_probe(toy(Peek, grid=Grid(24), causal=True)).ok


def test_gate_of_a_causal_workload_has_the_probe():
    assert red(check_mechanism(lambda: toy(grid=Grid(24)), causal=True)) == ["causality"]
    assert check_mechanism(lambda: toy(grid=Grid(24), causal=True), causal=True).ok


def test_gate_as_dict():
    found = check_mechanism(toy).as_dict()
    assert found["ok"] is True
    assert set(found["checks"][0]) == {"name", "ok", "value", "limit", "sentence"}
