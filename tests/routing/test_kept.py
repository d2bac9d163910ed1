"""Found blocks, sinks and windows: three kinds of keys that do not overlap."""

import pytest
import torch

from foveate.patterns.selection import Selection
from foveate.routing.kept import KeptLayout
from foveate.routing.tree import search_tree


@pytest.mark.parametrize(("n_q", "n_k"), [(96, 96), (77, 91), (5, 5), (40, 200)])
@pytest.mark.parametrize("options", [(2, 8, 8), (4, 8, 8), (4, 6, 11), (1, 2, 5)], ids=str)
def test_found_blocks_and_what_is_near_are_all_of_it_and_do_not_overlap(n_q, n_k, options):
    block_k, block_q, window = options
    q, k = torch.randn(2, 3, n_q, 4), torch.randn(2, 3, n_k, 4)
    found = search_tree(q, k, keys=8, block_q=block_q, block_k=block_k, window=window)
    layout = KeptLayout(n_q, n_k, block_k, block_q, window, sink=3)

    def dense(cells):
        return Selection.of_cells([cells], n_q, n_k).dense()

    apart, near, both = (
        dense(x) for x in (layout.found(found), layout.near(3, q.device), layout.both(found))
    )
    assert not (apart & near).any()
    assert (apart | near).equal(both)
    # Spelled out.
    at = torch.arange(n_q)[:, None] + n_k - n_q
    end = ((torch.arange(n_q)[:, None] // block_q + 1) * block_q + n_k - n_q).clamp(max=n_k)
    keys = torch.arange(n_k)
    sinks = -(-3 // block_k) * block_k
    assert near.expand(1, 1, n_q, n_k)[0, 0].equal(
        ((keys < sinks) | ((keys >= end - window) & (keys < end))) & (keys <= at)
    )
    assert not (both & (keys > at)).any()


def test_query_blocks_share_the_cells_of_what_is_near():
    layout = KeptLayout(256, 256, 2, 8, 16, sink=4)
    cells = layout.near(8, torch.device("cpu"))
    assert cells.q_ids.shape == (1, 1, 4, 64)
    assert cells.k_ids.shape == (1, 1, 4, 4 + 16 + 7 * 8)


def test_windows_of_incomplete_blocks_end_with_the_keys_or_where_the_block_would():
    ours, theirs = (
        KeptLayout(10, 10, 1, 8, 8, 0, whole=whole).near(1, torch.device("cpu")) for whole in (False, True)
    )
    assert ours.k_ids[0, 0, 1].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert theirs.k_ids[0, 0, 1].tolist() == [8, 9, -1, -1, -1, -1, -1, -1]
