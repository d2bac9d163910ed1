"""What `sample` refuses, by name, how "auto" chooses, and empty inputs."""

import pytest
import torch

from foveate.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from foveate.kernels.sample import sample
from foveate.kernels.sample.api import choose
from foveate.kernels.sample.contract import corners, prepare
from tests.kernels.sample.cases import make

CASE = make(bins=(3, 2)).to(torch.float32)
LEVELS, POINTS, WEIGHTS, FACTOR = list(CASE.levels), CASE.points, CASE.weights, list(CASE.factor)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": LEVELS[0]}, r"^levels: expected a sequence of maps.*Write \[x\]"),
        ({"levels": []}, r"^levels: expected at least one map"),
        ({"levels": [LEVELS[0].long(), LEVELS[1]]}, r"^levels\[0\]: expected a floating point dtype"),
        (
            {"levels": [LEVELS[0], LEVELS[1].double()]},
            r"^levels\[1\]: expected torch.float32, as levels\[0\]",
        ),
        ({"levels": [LEVELS[0][0, 0], LEVELS[1]]}, r"^levels\[0\]: expected \(batch, heads, channels"),
        ({"levels": [LEVELS[0], LEVELS[1][:, :1]]}, r"^levels\[1\]: expected \(2, 2, 3, '...'\)"),
        ({"levels": [LEVELS[0], LEVELS[1][..., 0]]}, r"^levels\[1\]: expected .* 2 spatial axes"),
        ({"levels": [LEVELS[0], LEVELS[1][..., :0]]}, r"^levels\[1\]: expected at least one pixel"),
        ({"levels": [LEVELS[0], LEVELS[1].to("meta")]}, r"^levels\[1\]: expected the device"),
        ({"points": POINTS[0]}, r"^points: expected 6 axes"),
        ({"points": POINTS.long()}, r"^points: expected a floating"),
        ({"points": POINTS.to("meta")}, r"^points: expected the device"),
        ({"points": POINTS[..., :2]}, r"^points: expected .*'P', 3\).* its depth is one more"),
        ({"points": POINTS[:, :, :, :1]}, r"^points: expected \(2, 2, 'Q', 2, 'P', 3\)"),
        ({"points": POINTS[:, :1]}, r"^points: expected \(2, 2, 'Q'"),
        ({"weights": WEIGHTS[..., 0]}, r"^weights: expected \(2, 2, 4, 2, 3\)"),
        ({"weights": WEIGHTS.long()}, r"^weights: expected a floating"),
        ({"factor": FACTOR[0]}, r"^factor: expected a sequence with one tensor per level"),
        ({"factor": FACTOR[:1]}, r"^factor: expected 2, one per level"),
        ({"factor": [FACTOR[0], FACTOR[1].long()]}, r"^factor\[1\]: expected a floating"),
        ({"factor": FACTOR[::-1]}, r"^factor\[0\]: expected \(2, 'D', 5, 4\) or \(2, 2, 'D', 5, 4\)"),
        ({"factor": [FACTOR[0][:, :0], FACTOR[1]]}, r"^factor\[0\]: expected"),
        ({"coords": "pixel"}, r"^coords: expected one of"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    given = {"levels": LEVELS, "points": POINTS, "weights": WEIGHTS, "factor": FACTOR} | changed
    with pytest.raises(ArgumentError, match=message):
        sample(given.pop("levels"), given.pop("points"), given.pop("weights"), **given)


def test_a_named_backend_that_cannot_says_why():
    with pytest.raises(UnsupportedError, match="knows no factor"):
        CASE.run("grid_sample")
    with pytest.raises(UnsupportedError, match="2 or 3 axes, these have 1"):
        make(sizes=((5,),)).run("grid_sample")
    with pytest.raises(UnknownNameError, match="backend of sample 'bags'"):
        CASE.run("bags")


def test_auto_chooses_as_documented():
    def chosen(**options):
        case = make(**options)
        return choose(prepare(case.levels, case.points, case.weights, case.factor, case.coords), "auto")

    assert chosen() == "bag"
    assert chosen(bins=(2, 2), weighted=False) == "bag"
    assert chosen(weighted=False) == "grid_sample"
    assert chosen(weighted=False, c=33) == "bag"
    assert chosen(weighted=False, coords="pixels") == "bag"
    assert chosen(weighted=False, sizes=((4,),)) == "bag"


@pytest.mark.parametrize("backend", ["bag", "grid_sample", "reference"])
@pytest.mark.parametrize("empty", ["b", "q", "p"])
@pytest.mark.parametrize("weighted", [True, False])
def test_nothing_gives_zeros_with_a_gradient(backend, empty, weighted):
    case = make(**{empty: 0}, weighted=weighted)
    out = case.run(backend)
    shape = tuple(0 if n == empty else s for n, s in zip("bmq", (2, 2, 4), strict=True))
    assert out.shape == shape + (() if weighted else (2, 0 if empty == "p" else 3)) + (3,)
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), case.leaves):
        assert not gradient.any()


def test_the_documented_order_of_corners():
    ids, weights = corners(torch.tensor([1.25, 2.5]), (4, 5))
    assert ids.tolist() == [9, 10, 13, 14]
    assert weights.tolist() == [0.375, 0.125, 0.375, 0.125]
    ids, weights = corners(torch.tensor([-0.5, 4.5]), (4, 5))
    assert ids.tolist() == [16, 16, 16, 16]
    assert weights.tolist() == [0, 0.25, 0, 0]
