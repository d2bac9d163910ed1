"""MaxViT: every 'works when' statement of its description."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.papers.maxvit import SIZES, network
from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.maxvit import MaxViTBlock, MBConv, PartitionAttention
from foveate.mechanisms.projections import merge_heads


def layer(**options):
    torch.manual_seed(0)
    return PartitionAttention(**{"dim": 8, "heads": 2, "window": 4, **options}).double()


def tokens(grid, dim=8):
    return torch.randn(2, grid.numel, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_a_window_as_large_as_the_map_is_full_attention(partition):
    grid = Grid(4, 4)
    module, x = layer(partition=partition), tokens(grid)
    at = grid.coords()
    offset = at[None] - at[:, None] + 3  # key minus query
    bias = module.position.table[:, offset[..., 0], offset[..., 1]]
    q, k, v = module.qkv(x)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(module(x, grid), module.proj(merge_heads(dense)))


@pytest.mark.parametrize(("sizes", "reached"), [((16, 16), True), ((8, 12), True), ((20, 16), False)])
def test_block_then_grid_connects_every_pair_where_windows_fill_the_cells(sizes, reached):
    grid = Grid(*sizes)
    near, far = (layer(partition=p).where(grid).dense().float() for p in ("block", "grid"))
    # A cell of the grid is L / G wide; a window of P tokens meets every place of it when P >= L / G.
    assert bool((far @ near > 0).all()) == reached
    assert not bool(((near + far) > 0).all())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_both_partitions_put_each_token_in_one_class(py, px, ny, nx):
    grid, window = Grid(py * ny, px * nx), (py, px)
    for partition in ("block", "grid"):
        mask = layer(window=window, partition=partition).where(grid).dense()
        assert (mask.sum(1) == py * px).all()
        assert torch.equal(mask, mask.T)
        # Who sees one another sees the same tokens: the rows are as many different ones as there are classes.
        assert len(mask.unique(dim=0)) == ny * nx


@given(st.integers(1, 4), st.integers(1, 5))
def test_grid_attention_is_block_attention_on_the_permuted_map(window, cells):
    grid = Grid(window * cells)
    i = torch.arange(grid.numel)
    to = i % cells * window + i // cells
    block, points = (layer(window=(window,), partition=p) for p in ("block", "grid"))
    points.load_state_dict(block.state_dict())
    x = tokens(grid)
    permuted = torch.empty_like(x)
    permuted[:, to] = x
    torch.testing.assert_close(points(x, grid), block(permuted, grid)[:, to])


def test_the_bias_is_read_key_minus_query():
    grid = Grid(4)
    module, x = layer(window=(4,)), tokens(grid)
    with torch.no_grad():
        module.position.table.zero_()
        module.position.table[..., 4] = 50.0  # one ahead
    v = module.qkv(x)[2]
    out = module(x, grid)
    torch.testing.assert_close(out[:, :3], module.proj(merge_heads(v))[:, 1:], rtol=1e-6, atol=1e-6)


def test_grid_attention_wants_multiples_and_windows_do_not():
    grid = Grid(6, 5)
    assert layer(window=4)(tokens(grid), grid).shape == (2, 30, 8)
    with pytest.raises(ArgumentError, match=r"^grid: .*multiples of window"):
        layer(window=4, partition="grid")(tokens(grid), grid)
    with pytest.raises(ArgumentError, match=r"^partition:"):
        layer(partition="axial")


def test_cost_is_linear_in_tokens():
    for partition in ("block", "grid"):
        for side in (28, 56, 112):
            n = side * side
            where = layer(window=7, partition=partition).where(Grid(side, side))
            e = explain((1, 2, n, 4), (1, 2, n, 4), (1, 2, n, 4), where=where)
            assert e.pairs_needed == 2 * n * 49


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_mbconv_pads_as_tensorflow_does(side, stride):
    torch.manual_seed(1)
    conv = MBConv(dim=3, dim_out=6, stride=stride).double().eval()
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    wide = conv.act(conv.norm1(conv.expand(conv.pre_norm(x))))
    size = -(-side // stride)
    total = (size - 1) * stride + 3 - side  # TensorFlow's rule: the larger half comes after
    padded = torch.zeros(1, wide.shape[1], side + total, side + total, dtype=x.dtype)
    low = total // 2
    padded[:, :, low : low + side, low : low + side] = wide
    y = torch.nn.functional.conv2d(padded, conv.depthwise.weight, stride=stride, groups=wide.shape[1])
    y = conv.act(conv.norm2(y))
    y = conv.shrink(y * conv.se(y.mean((2, 3), keepdim=True)))
    pooled = torch.zeros(1, 3, size, size, dtype=x.dtype)
    for i in range(size):
        for j in range(size):
            rows, columns = (slice(a * stride, a * stride + stride) for a in (i, j))
            pooled[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))  # of what is there
    torch.testing.assert_close(conv(x), conv.shortcut(pooled) + y)


def test_block_downsamples_trains_and_knows_its_options():
    torch.manual_seed(0)
    block = MaxViTBlock(dim=6, dim_out=8, heads=2, window=2, lattice=(4, 2), stride=2)
    x = torch.randn(2, 6, 15, 8, requires_grad=True)
    y = block(x)
    assert y.shape == (2, 8, 8, 4)
    y.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert (block.attn_block.attn.window, block.attn_grid.attn.window) == ((2, 2), (4, 2))
    with pytest.raises(ArgumentError, match=r"^stride:"):
        MaxViTBlock(dim=8, heads=2, stride=3)


@pytest.mark.parametrize(("size", "count"), [("T", 30_916_528), ("S", 68_927_956), ("L", 211_785_560)])
def test_published_sizes_have_the_published_parameters(size, count):
    stem, depths, dim, *_ = SIZES[size]
    with torch.device("meta"):
        assert sum(p.numel() for p in network(stem, depths, dim).parameters()) == count
