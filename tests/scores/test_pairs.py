import pytest
import torch

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.scores.pairs import KeyFrame, Pairs, take_pairs, take_rows
from tests.scores.blocks import B, H, pick


@pytest.mark.parametrize("shape", [(B, H, 7, 2), (1, H, 7, 2), (B, 1, 7), (1, 1, 7), (B, H, 1, 2)])
@pytest.mark.parametrize("lead", [(1, 1), (B, H), (1, H)])
def test_take_rows_reads_each_row(shape, lead):
    x, ids = torch.randn(shape), torch.randint(0, 7, (*lead, 2, 3))
    full = x.expand(B, H, 7, *shape[3:])
    got = take_rows(x, ids)
    got = got.expand(B, H, 2, 3, *shape[3:])
    for b in range(B):
        for h in range(H):
            want = full[b, h][ids[b % lead[0], h % lead[1]]]
            assert torch.equal(got[b, h], want)


@pytest.mark.parametrize("shape", [(B, H, 5, 6), (1, 1, 5, 6), (B, 1, 1, 6), (1, H, 5, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("lead", [(1, 1), (B, H)])
def test_take_pairs_reads_each_pair(shape, lead):
    x = torch.randn(shape)
    q_ids, k_ids = torch.randint(0, 5, (*lead, 2, 3)), torch.randint(0, 6, (*lead, 2, 4))
    at = Pairs(q_ids, k_ids, n_q=5, n_k=6)
    got = take_pairs(x, at).expand(B, H, 2, 3, 4)
    assert torch.equal(got, pick(x.expand(B, H, 5, 6), q_ids, k_ids))


def test_absent_ids_are_masked_and_read_as_zero():
    at = Pairs(torch.tensor([[[[0, -1]]]]), torch.tensor([[[[-1, 2]]]]), n_q=3, n_k=3)
    assert at.present[0, 0, 0].tolist() == [[False, True], [False, False]]
    assert at.q.min() == 0
    assert at.k.min() == 0


def test_phantom_keys_stand_outside_the_grid():
    frame = KeyFrame(Grid(2, 3), Grid(4, 5), (1, 1))
    at = Pairs.full(6, 20, frame=frame)
    y, x = at.key_coords(Grid(2, 3))
    assert y.unique().tolist() == [-1, 0, 1, 2]
    assert x.unique().tolist() == [-1, 0, 1, 2, 3]
    padded = frame.pad(torch.arange(1, 7)[None, None], dim=2)
    assert padded.reshape(4, 5)[1:3, 1:4].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert padded.sum() == 21


def test_phantom_keys_need_the_score_on_the_same_grid():
    at = Pairs.full(6, 20, frame=KeyFrame(Grid(2, 3), Grid(4, 5), (1, 1)))
    with pytest.raises(UnsupportedError, match="phantom keys on Grid"):
        at.key_coords(Grid(3, 2))
    with pytest.raises(UnsupportedError, match="score"):
        at.key_coords(None)


def test_alike_cells_share_one_offset_block():
    q, k = torch.tensor([[[[0, 1], [4, 5]]]]), torch.tensor([[[[0, 1, 2], [4, 5, 6]]]])
    one = Pairs(q, k, n_q=8, n_k=8, alike=True).offsets(None)[0]
    each = Pairs(q, k, n_q=8, n_k=8).offsets(None)[0]
    assert one.shape == (1, 1, 1, 2, 3)
    assert torch.equal(one.expand_as(each), each)
