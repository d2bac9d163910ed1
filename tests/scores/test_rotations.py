import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.scores.rotary import axial_rotary, multimodal_rotary, rotary
from foveate.scores.rotations import AxialRotary, MultimodalRotary, Rotary


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("interleave", [False, True])
def test_text_is_rotated_as_by_rotary(style, interleave):
    x, at = torch.randn(2, 3, 5, 12), torch.arange(5)
    got = multimodal_rotary(
        x, at[:, None].expand(-1, 3), sections=(2, 2, 2), style=style, interleave=interleave
    )
    torch.testing.assert_close(got, rotary(x, at, style=style))


@pytest.mark.parametrize(
    ("interleave", "axes"), [(False, [0, 0, 0, 1, 1, 2]), (True, [0, 1, 2, 0, 1, 0])], ids=str
)
def test_each_pair_turns_with_its_own_axis(interleave, axes):
    x, at = torch.randn(2, 5, 12).double(), torch.randint(0, 50, (2, 5, 3))
    got = multimodal_rotary(x, at, sections=(3, 2, 1), interleave=interleave)
    for pair, axis in enumerate(axes):
        alone = rotary(x, at[..., axis])
        for channel in (pair, pair + 6):
            torch.testing.assert_close(got[..., channel], alone[..., channel])


def test_products_depend_on_differences_along_every_axis():
    q, k = torch.randn(2, 1, 1, 12).double()
    turn = MultimodalRotary((3, 2, 1))
    a, b, move = torch.tensor([[[1, 5, 2]]]), torch.tensor([[[4, 0, 9]]]), torch.tensor([7, -3, 11])
    want = (turn(q, a) * turn(k, b)).sum()
    torch.testing.assert_close((turn(q, a + move) * turn(k, b + move)).sum(), want)
    assert not torch.isclose((turn(q, a + move) * turn(k, b)).sum(), want)


def test_values_do_what_the_functions_do_print_and_compose():
    x = torch.randn(1, 2, 12, 8)
    torch.testing.assert_close(Rotary(base=100.0)(x), rotary(x, base=100.0))
    torch.testing.assert_close(AxialRotary(Grid(3, 4))(x), axial_rotary(x, Grid(3, 4)))
    both = Rotary() + Rotary(style="half", base=50.0)
    torch.testing.assert_close(both(x), rotary(rotary(x), base=50.0))
    assert repr(both) == "Rotary() + Rotary(base=50.0)"
    assert repr(MultimodalRotary((1, 2, 1))) == "MultimodalRotary(sections=(1, 2, 1))"


def test_bad_arguments_are_named():
    x = torch.randn(1, 5, 12)
    with pytest.raises(ArgumentError, match=r"^sections:"):
        multimodal_rotary(x, torch.zeros(5, 3), sections=(2, 2, 1))
    with pytest.raises(ArgumentError, match=r"^sections:"):
        multimodal_rotary(x, torch.zeros(5, 3), sections=(1, 1, 4), interleave=True)
    with pytest.raises(ArgumentError, match=r"^positions:"):
        multimodal_rotary(x, torch.zeros(4, 3), sections=(2, 2, 2))
    with pytest.raises(ArgumentError, match=r"^positions:"):
        MultimodalRotary((2, 2, 2))(x)
