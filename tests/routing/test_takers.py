"""Blocks and their takers: the pairs of `select_blocks`, without any that nobody asked for."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing.blocks import select_blocks
from foveate.routing.takers import STRETCH, select_alone, select_takers


@pytest.mark.parametrize(
    ("b", "h", "n_q", "n_k", "block", "causal"),
    [
        (1, 2, 50, 50, 8, True),
        (2, 1, 33, 70, 16, True),
        (1, 1, 70, 33, 5, True),
        (1, 2, 40, 40, 7, False),
        (1, 1, 5, 5, 64, True),
        (1, 1, 130, 130, 1, True),
        (1, 1, STRETCH + 9, 64, 16, False),
    ],
)
def test_the_pairs_of_select_blocks(b, h, n_q, n_k, block, causal):
    chosen = torch.rand(b, h, n_q, -(-n_k // block)) < 0.4
    expected = select_blocks(chosen, 1, block, n_q, n_k, causal=causal).dense()
    for make in (select_takers, select_alone):
        found = make(chosen, block, n_q, n_k, causal=causal)
        # No pair stands in two cells, so that one softmax over all of a query's cells is right.
        found.schedule.validate()
        assert found.dense().equal(expected)


def test_takers_compute_what_was_asked_for_and_neighbours_that_agree_share_cells():
    n, block = 1024, 32
    alone = torch.rand(1, 1, n, n // block) < 0.25
    alike = alone[:, :, ::64].repeat_interleave(64, 2)
    for chosen, makes in ((alone, select_takers), (alike, select_blocks)):
        found = select_alone(chosen, block, n, n, causal=True).schedule
        assert found.pairs_computed < 1.5 * found.pairs_needed
        assert found.is_single_cell == (makes is select_blocks)
    joined = select_blocks(alone, 1, block, n, n, causal=True, rows=16).schedule
    assert joined.pairs_computed > 3 * joined.pairs_needed


def test_nothing_chosen_gives_no_pair_and_a_wrong_table_is_refused():
    nothing = torch.zeros(1, 1, 20, 5, dtype=torch.bool)
    for make in (select_takers, select_alone):
        assert not make(nothing, 4, 20, 20).dense().any()
        with pytest.raises(ArgumentError, match="chosen"):
            make(nothing[..., :-1], 4, 20, 20, causal=True)
