"""The picture of the dependency tree: its numbers, and that the script runs."""

import pytest
import torch

from benchmarks import dependency_tree
from benchmarks.dependency_tree import PATCH, SIDE, explained, painted, patches_of


def test_patches_are_row_major():
    image = torch.arange(SIDE * SIDE).reshape(1, 1, SIDE, SIDE).float()
    image = image.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(1, 3, -1, -1)
    assert patches_of(image)[0].mean(-1).tolist() == list(range(SIDE * SIDE))


def test_explained_is_one_for_subtrees_of_one_colour_and_nothing_for_one_subtree():
    colours = torch.rand(4, 3)[[0, 1, 1, 2, 3, 0]]
    place = torch.tensor([5, 2, 2, 0, 1, 5])
    assert torch.allclose(painted(colours, place), colours)
    assert explained(colours, place) == pytest.approx(1)
    assert explained(colours, torch.zeros(6, dtype=torch.long)) == pytest.approx(0, abs=1e-6)


def test_the_script_draws(tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    dependency_tree.main(["--steps", "2", "--out", str(tmp_path / "tree.png")])
    assert (tmp_path / "tree.png").stat().st_size > 1000
    assert f"{SIDE**2}, " in capsys.readouterr().out
