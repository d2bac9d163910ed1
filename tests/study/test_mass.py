"""Blockwise statistics against the plain N x N ones."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, Sinks, SlidingWindow
from foveate.patterns.segments import Segments
from foveate.patterns.selection import Selection
from foveate.study import mass
from foveate.study.maps import Maps
from foveate.study.mass import blocks, rows_of, spaced


def layer(n=48, batch=2, heads=3, scale=None):
    q, k, v = (torch.randn(batch, heads, n, 8) for _ in range(3))
    return Maps("", q, k, v, scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 5 * 2 * 3 * 48, 1 << 24])
def test_blocks_are_full_attention(monkeypatch, causal, chunk):
    monkeypatch.setattr(mass, "CHUNK", chunk)
    maps = layer(scale=0.7)
    dense = attend(maps.q, maps.k, maps.v, where=Causal() if causal else None, scale=0.7)
    found = list(blocks(maps, torch.arange(48), causal=causal))
    torch.testing.assert_close(torch.cat([rows.full for rows in found], 2), dense)
    assert torch.cat([rows.q_ids for rows in found]).tolist() == list(range(48))
    assert [rows.first for rows in found] == [int(rows.q_ids[0]) for rows in found]


@pytest.mark.parametrize(
    "where",
    [
        SlidingWindow(5, 2) | Sinks(3),
        Selection(
            torch.randint(0, 48, (2, 1, 7, 4)), torch.randint(-1, 48, (2, 3, 7, 9)), n_q=48, n_k=48
        ).distinct(),
        Segments(torch.arange(48)[None] // 11) & Causal(),
        Selection.of_pattern(SlidingWindow(4), 48, 48) | Sinks(2),
    ],
    ids=["pattern", "selection", "segments", "mixed"],
)
def test_rows_of_a_mask_are_rows_of_its_dense_form(where):
    dense = where.dense(48) if not isinstance(where, Selection) else where.dense()
    some = torch.tensor([0, 7, 8, 30, 47])
    found = rows_of(where, some, 48)
    assert torch.equal(found, dense.reshape(found.shape[0], found.shape[1], 48, 48)[:, :, some])


def test_a_pair_that_stands_twice_is_refused():
    twice = Selection(torch.zeros(1, 1, 1, 1).long(), torch.tensor([[[[3, 3]]]]), n_q=8, n_k=8)
    with pytest.raises(ArgumentError, match="every pair stands once"):
        rows_of(twice, torch.arange(8), 8)


@pytest.mark.parametrize("causal", [False, True])
def test_through_a_mask_is_attention_over_its_pairs(causal):
    maps = layer()
    where = SlidingWindow(6) & Causal() if causal else SlidingWindow(6, 3)
    (rows,) = blocks(maps, torch.arange(48), causal=causal)
    captured, count, output = rows.through(rows_of(where, rows.q_ids, 48))
    torch.testing.assert_close(output, attend(maps.q, maps.k, maps.v, where=where))
    assert torch.equal(count[0, 0], where.dense(48).sum(1))
    assert (captured > 0).all()
    assert (captured <= 1 + 1e-6).all()
    assert (captured <= rows.oracle(count) + 1e-6).all()
    empty = rows.through(torch.zeros(1, 1, 48, 48, dtype=torch.bool))
    assert not empty[0].any()
    assert not empty[2].any()
    assert not rows.oracle(empty[1]).any()


@pytest.mark.parametrize("causal", [False, True])
def test_the_best_pairs_capture_what_the_oracle_says_and_random_ones_their_share(causal):
    maps = layer(n=64, batch=4, heads=4)
    (rows,) = blocks(maps, torch.arange(64), causal=causal)
    best, count, _ = rows.through(rows.ranks() < 9)
    assert torch.equal(count[0, 0], rows.visible.clamp(max=9))
    torch.testing.assert_close(best, rows.oracle(count))
    drawn, count, _ = rows.through(rows.ranks(torch.Generator().manual_seed(1)) < 9)
    assert torch.equal(count[0, 0], rows.visible.clamp(max=9))
    torch.testing.assert_close(drawn.mean(), (count / rows.visible).mean(), atol=0.02, rtol=0)
    # No choice of nine pairs beats it.
    for _ in range(5):
        other = rows.ranks(torch.Generator().manual_seed(int(torch.randint(99, ())))) < 9
        assert (rows.through(other)[0] <= best + 1e-6).all()


@pytest.mark.parametrize(("n", "most"), [(10, 20), (4096, 512), (1000, 7), (5, 5)])
def test_spaced_ids_are_distinct_ascending_and_of_every_place_in_a_block(n, most):
    ids = spaced(n, most)
    assert len(ids) == min(n, most)
    assert (ids.diff() > 0).all()
    assert 0 <= ids[0] < ids[-1] < n
    if most == 512:
        assert len((ids % 8).unique()) == 8


def test_maps_name_what_does_not_fit():
    x = torch.randn(1, 4, 8, 16)
    with pytest.raises(ArgumentError, match="q: expected a floating point tensor"):
        Maps("", x[0], x, x)
    with pytest.raises(ArgumentError, match="v: expected batch and tokens of q"):
        Maps("", x, x, x[:, :, :4])
    with pytest.raises(ArgumentError, match="k: expected channels of q, 16"):
        Maps("", x, x[..., :8], x)
    with pytest.raises(ArgumentError, match="heads that divides"):
        Maps("", x, x[:, :3], x[:, :3])
    assert Maps("", x, x[:, :2], x[:, :2]).spread().k.shape[1] == 4
