"""Cells with a word per key, against the same cells with a mask."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.patterns.bits import BitCells, BitGroup, count_bits, low_bits, unpack
from foveate.patterns.cells import Cells
from foveate.patterns.selection import Selection


def some(tq=64, tk=9, cells=3):
    words = torch.randint(-(2**63), 2**63 - 1, (2, 1, cells, tk)) & low_bits(torch.tensor(tq))
    q_ids = torch.arange(cells * tq).view(1, 1, cells, tq)
    k_ids = torch.stack([torch.randperm(40)[:tk] for _ in range(3 * cells)]).view(1, 3, cells, tk)
    return q_ids, k_ids, words


def test_low_bits_and_counts_for_every_number_of_bits():
    every = torch.arange(65)
    assert low_bits(every).tolist() == [(1 << n) - 1 if n < 64 else -1 for n in range(65)]
    assert count_bits(low_bits(every)).equal(every)
    words = torch.randint(-(2**63), 2**63 - 1, (500,))
    assert count_bits(words).equal(unpack(words, 64).sum(-2))


@pytest.mark.parametrize("tq", [64, 63, 5])
def test_words_say_what_the_mask_says(tq):
    q_ids, k_ids, words = some(tq)
    bits = BitCells(q_ids, k_ids, words)
    plain = Cells(bits.q_ids, bits.k_ids, unpack(words, tq).expand(2, 3, -1, -1, -1))
    made = [Selection.of_cells([cells], 3 * tq, 40) for cells in (bits, plain)]
    assert made[0].dense().equal(made[1].dense())
    for name in ("pairs_needed", "pairs_computed", "full_cells", "leading"):
        assert getattr(made[0].schedule, name) == getattr(made[1].schedule, name)
    assert isinstance(made[0].schedule.groups[0], BitGroup)
    assert (made[0].schedule.expand() > 0).equal(made[1].dense())


def test_the_algebra_and_moving_keep_the_pairs():
    selection = Selection.of_cells([BitCells(*some())], 192, 40)
    keep = torch.rand(192, 40) < 0.5
    other = Selection(
        torch.arange(192).view(1, 1, 1, -1), torch.arange(40).view(1, 1, 1, -1), keep, n_q=192, n_k=40
    )
    assert (selection & other).dense().equal(selection.dense() & keep)
    assert (selection | other).dense().equal(selection.dense() | keep)
    assert selection.to("cpu").dense().equal(selection.dense())
    assert selection.schedule.transpose().expand().equal(selection.schedule.expand().transpose(-1, -2))


def test_a_group_takes_64_queries_and_a_word_per_key():
    q_ids, k_ids, words = some()
    with pytest.raises(ArgumentError, match="q_ids"):
        BitGroup(torch.zeros(1, 1, 3, 65, dtype=torch.long), k_ids, words)
    with pytest.raises(ArgumentError, match="words"):
        BitGroup(q_ids, k_ids, words[..., :-1])
    with pytest.raises(ArgumentError, match="words"):
        BitGroup(q_ids, k_ids, words.int())
