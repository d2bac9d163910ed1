"""DiNA: every 'works when' statement of its description, as a test."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.local.dilated_neighborhood import DilatedNeighborhoodAttention
from foveate.mechanisms.local.fused_neighborhood_attention import NeighborhoodAttention
from foveate.mechanisms.projections import merge_heads


def module(**options):
    made = DilatedNeighborhoodAttention(dim=8, heads=2, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def test_without_dilation_and_bias_it_is_neighborhood_attention():
    ours = module(window=3, bias=False)
    plain = NeighborhoodAttention(dim=8, heads=2, window=3).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x, Grid(5, 6)), plain(x, Grid(5, 6)))


def test_window_of_the_whole_map_is_full_attention_with_full_relative_bias():
    grid, ours = Grid(5, 5), module(window=5)
    x = torch.randn(2, 25, 8, dtype=torch.float64)
    q, k, v = ours.qkv(x)
    coords = grid.coords()
    offset = coords[None] - coords[:, None] + 4
    bias = ours.position.table[:, offset[..., 0], offset[..., 1]]
    weights = (q @ k.transpose(-1, -2) * 4**-0.5 + bias).softmax(-1)
    torch.testing.assert_close(ours(x, grid), ours.proj(merge_heads(weights @ v)))


@pytest.mark.parametrize("sizes", [(9, 6), (10, 11)])
def test_dilation_is_attention_on_each_sub_image(sizes):
    dilated, plain = module(window=3, dilation=(3, 2)), module(window=3)
    plain.load_state_dict(dilated.state_dict())
    grid = Grid(*sizes)
    x = torch.randn(1, grid.numel, 8, dtype=torch.float64)
    out = dilated(x, grid).unflatten(1, sizes)
    image = x.unflatten(1, sizes)
    for a in range(3):
        for b in range(2):
            part = image[:, a::3, b::2]
            small = Grid(*part.shape[1:-1])
            expected = plain(part.flatten(1, 2), small).unflatten(1, small.sizes)
            torch.testing.assert_close(out[:, a::3, b::2], expected)


def test_bias_is_indexed_key_minus_query_in_dilated_steps():
    ours = module(window=(3,), dilation=2)
    with torch.no_grad():
        ours.qkv.weight[:16] = 0  # no content: logits are the bias alone
        ours.qkv.bias[:16] = 0
    table = ours.position.table
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    v = ours.qkv(x)[2][0, 1]
    got = ours(x, Grid(8))
    # Token 1 stands at the border: its keys are 1, 3, 5 at offsets 0, 1, 2 steps.
    weights = table[1, torch.tensor([2, 3, 4])].softmax(0)
    head = torch.zeros(8, dtype=torch.float64)
    head[4:] = weights @ v[[1, 3, 5]]
    v0 = ours.qkv(x)[2][0, 0]
    head[:4] = table[0, torch.tensor([2, 3, 4])].softmax(0) @ v0[[1, 3, 5]]
    torch.testing.assert_close(got[0, 1], ours.proj(head))


def test_every_row_has_the_keys_of_a_window():
    ours = module(window=3, dilation=2)
    assert (ours.where(Grid(7, 9)).dense().sum(1) == 9).all()


def test_small_maps_are_padded_with_zeros_that_take_part():
    ours, grid = module(window=3, dilation=2), Grid(4, 8)
    x = torch.randn(1, 32, 8, dtype=torch.float64)
    room = Grid(6, 8)
    padded = torch.zeros(1, 6, 8, 8, dtype=torch.float64)
    padded[:, :4] = x.unflatten(1, grid.sizes)
    expected = ours(padded.flatten(1, 2), room).unflatten(1, room.sizes)[:, :4].flatten(1, 2)
    torch.testing.assert_close(ours(x, grid), expected)


def test_for_workload_alternates_dilation():
    odd = DilatedNeighborhoodAttention.for_workload(dim=8, grid=Grid(32, 16), heads=2)
    even = DilatedNeighborhoodAttention.for_workload(dim=8, grid=Grid(32, 16), heads=2, layer=0)
    assert (odd.dilation, even.dilation) == ((4, 2), (1, 1))
    with pytest.raises(ArgumentError, match="causal"):
        DilatedNeighborhoodAttention.for_workload(dim=8, grid=Grid(32), heads=2, causal=True)


def test_parameters():
    made = DilatedNeighborhoodAttention(dim=16, heads=2, window=3, dilation=2)
    assert tuple(made.position.table.shape) == (2, 5, 5)
    assert sum(p.numel() for p in made.parameters()) == 16 * 48 + 48 + 16 * 16 + 16 + 2 * 25
