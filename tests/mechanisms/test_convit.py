"""ConViT: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.convit import GatedPositionalAttention


def layer(heads=4, dim=16, **options):
    return GatedPositionalAttention(dim=dim, heads=heads, **options).double()


def shifted(x, dy, dx):
    """Return the map read at (y + dy, x + dx), the nearest cell at the border."""
    h, w = x.shape[-2:]
    ys, xs = (torch.arange(h) + dy).clamp(0, h - 1), (torch.arange(w) + dx).clamp(0, w - 1)
    return x[..., ys[:, None], xs]


@pytest.mark.parametrize("heads", [4, 9])
def test_open_gate_and_strong_locality_are_a_convolution(heads):
    module, grid = layer(heads, 36, locality_strength=200.0), Grid(5, 6)
    nn.init.constant_(module.gating_param, 60.0)
    x = torch.randn(2, 30, 36, dtype=torch.float64)
    side = int(heads**0.5)
    values = split_heads(module.v(x), heads).unflatten(2, grid.sizes)
    # c is (side - 1) / 2: for an even kernel head centres lie between cells, four of them at equal distance.
    center = (side - 1) / 2 if side % 2 == 0 else side // 2
    expected = torch.empty_like(values)
    for row in range(side):
        for column in range(side):
            h = row + side * column
            dy, dx = row - center, column - center
            if side % 2 == 0:
                corners = [
                    shifted(values[:, h].movedim(-1, 1), int(dy + a), int(dx + b))
                    for a in (-0.5, 0.5)
                    for b in (-0.5, 0.5)
                ]
                expected[:, h] = (sum(corners) / 4).movedim(1, -1)
            else:
                expected[:, h] = shifted(values[:, h].movedim(-1, 1), int(dy), int(dx)).movedim(1, -1)
    got = module._mix(x, values.flatten(2, 3), grid).unflatten(2, grid.sizes)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(got[inside], expected[inside], rtol=0, atol=1e-9)
    if side % 2:  # at the border the nearest cell inside the map
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_closed_gate_is_plain_attention():
    module, grid = layer(), Grid(3, 4)
    nn.init.constant_(module.gating_param, -60.0)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    q, k = (split_heads(part, 4) for part in module.qk(x).chunk(2, dim=-1))
    plain = module.proj(merge_heads(attend(q, k, split_heads(module.v(x), 4))))
    torch.testing.assert_close(module(x, grid), plain)


def test_rows_of_the_map_sum_to_one():
    module, grid = layer(), Grid(4, 4)
    rows = module.attention_map(torch.randn(2, 16, 16, dtype=torch.float64), grid).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_positions_do_not_depend_on_the_input():
    module, grid = layer(), Grid(4, 4)
    nn.init.constant_(module.gating_param, 60.0)
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(
        module.attention_map(x, grid), module.attention_map(x[:, torch.randperm(16)], grid)
    )


def test_starts_local_where_plain_attention_is_not():
    torch.manual_seed(1)
    module, grid = layer(heads=9, dim=36), Grid(10, 10)
    x = torch.randn(2, 100, 36, dtype=torch.float64)
    local = module.nonlocality(x, grid).mean()
    nn.init.constant_(module.gating_param, -60.0)
    dense = module.nonlocality(x, grid).mean()
    assert local < 0.6 * dense
    nn.init.constant_(module.gating_param, 60.0)
    assert 0.5 < module.nonlocality(x, grid).mean() < 2.0


def test_channel_0_is_the_column_and_offsets_are_key_minus_query():
    module, grid = layer(heads=1, dim=4, local_init=False), Grid(2, 3)
    with torch.no_grad():
        module.pos_proj.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
    table = module.position(grid).table[0]
    assert table[1, 2] == 0  # no offset: the middle
    assert table[1, 3] == 1 + 100  # one column to the right
    assert table[2, 2] == 10 + 100  # one row down


def test_local_init_gives_each_head_its_cell():
    module = layer(heads=9, dim=9, locality_strength=2.0)
    torch.testing.assert_close(module.v.weight, torch.eye(9, dtype=torch.float64))
    assert module.gating_param.eq(1).all()
    # head 3 = (row 0, column 1): one row up, same column
    assert module.pos_proj.weight[3].tolist() == [0.0, -4.0, -2.0]


def test_refuses_what_it_cannot():
    with pytest.raises(ArgumentError, match="causal"):
        GatedPositionalAttention.for_workload(dim=8, grid=Grid(4, 4), heads=2, causal=True)
    with pytest.raises(ArgumentError, match="grid"):
        GatedPositionalAttention.for_workload(dim=8, grid=Grid(16), heads=2)
