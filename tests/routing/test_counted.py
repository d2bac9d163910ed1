"""The best blocks of every row by a count, against their ranks."""

import pytest
import torch

from foveate.routing.blocks import rank_levels
from foveate.routing.counted import choose_count


@pytest.mark.parametrize("values", [None, 3])
def test_as_many_of_the_best_as_each_row_is_told(values):
    for trial in range(12):
        scores = torch.randn(2, 2, 200, 9)
        if values is not None:  # few values, so that there are ties
            scores = torch.randint(0, values, scores.shape).float()
        allowed = (
            torch.rand(200, 9) < 0.7 if trial % 2 else torch.arange(9) < torch.arange(200)[:, None] // 20
        )
        count = torch.randint(1, 9, (200,)) if trial % 3 else (allowed.sum(-1) // 2).clamp(min=1)
        assert choose_count(scores, count, allowed).equal(
            rank_levels(scores, count[:, None], (1,), allowed) > 0
        )
        assert choose_count(scores, count).equal(rank_levels(scores, count[:, None], (1,)) > 0)


def test_no_rows_and_rows_that_may_choose_nothing():
    assert choose_count(torch.zeros(1, 0, 5), torch.zeros(0, dtype=torch.long)).shape == (1, 0, 5)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    assert not choose_count(torch.randn(2, 3, 5), torch.tensor([1, 4, 9]), nothing).any()
