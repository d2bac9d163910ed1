"""Swin: every 'works when' statement of its description, as a test."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.local.swin import SwinBlock, WindowAttention, relative_position_index, window_tokens
from foveate.mechanisms.projections import merge_heads


def attention(**options):
    made = WindowAttention(dim=8, heads=2, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def dependence(module, grid, channels=8):
    """Which outputs depend on which inputs, (N, N) bool, by the gradient."""
    x = torch.randn(1, grid.numel, channels, dtype=torch.float64, requires_grad=True)
    out = module(x, grid)
    rows = [torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0] for i in range(grid.numel)]
    return torch.stack(rows).abs().amax(-1) > 0


@pytest.mark.parametrize("window", [6, 7])
def test_window_as_large_as_the_map_is_global_attention_with_relative_bias(window):
    ours, grid = attention(window=window, shift=3), Grid(6, 6)
    x = torch.randn(2, 36, 8, dtype=torch.float64)
    q, k, v = ours.qkv(x)
    coords = grid.coords()
    offset = coords[:, None] - coords[None] + window - 1
    bias = ours.position.table[:, offset[..., 0], offset[..., 1]]
    weights = (q @ k.transpose(-1, -2) * 4**-0.5 + bias).softmax(-1)
    torch.testing.assert_close(ours(x, grid), ours.proj(merge_heads(weights @ v)))


def test_permuting_windows_permutes_outputs():
    ours, grid = attention(window=3), Grid(6, 9)
    tokens = window_tokens(grid, (3, 3), (0, 0))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    x = torch.randn(1, 54, 8, dtype=torch.float64)
    moved = torch.empty_like(x)
    moved[:, tokens.flatten()] = x[:, tokens[order].flatten()]
    out, out_moved = ours(x, grid), ours(moved, grid)
    torch.testing.assert_close(out_moved[:, tokens.flatten()], out[:, tokens[order].flatten()])


def test_nothing_leaks_across_windows():
    grid = Grid(6, 6)
    ids = window_tokens(grid, (3, 3), (0, 0))
    expected = torch.zeros(36, 36, dtype=torch.bool)
    for window in ids:
        expected[window[:, None], window[None]] = True
    assert torch.equal(dependence(attention(window=3), grid), expected)


def labels(grid, window, shift):
    """The authors' region labels on the rolled map, brought back to token order."""
    label = torch.zeros(grid.sizes, dtype=torch.long)
    count = 0
    bounds = [
        [slice(0, n - w), slice(n - w, n - s), slice(n - s, n)]
        for n, w, s in zip(grid, window, shift, strict=True)
    ]
    for rows in bounds[0]:
        for columns in bounds[1]:
            label[rows, columns] = count
            count += 1
    return label


@pytest.mark.parametrize(("sizes", "window", "shift"), [((8, 12), 4, 2), ((6, 9), 3, 1)])
def test_shifted_attention_is_dense_attention_with_the_authors_mask(sizes, window, shift):
    grid, both = Grid(*sizes), (shift, shift)
    ours = attention(window=window, shift=shift)
    ids = window_tokens(grid, (window, window), both)
    label = labels(grid, (window, window), both).flatten()
    inside = window_tokens(grid, (window, window), (0, 0))
    mask = torch.zeros(grid.numel, grid.numel, dtype=torch.bool)
    for tokens, places in zip(ids, inside, strict=True):
        same = label[places][:, None] == label[places][None]
        mask[tokens[:, None], tokens[None]] = same
    assert torch.equal(ours.where(grid).dense(), mask)
    x = torch.randn(1, grid.numel, 8, dtype=torch.float64)
    q, k, v = ours.qkv(x)
    expected = attend(q, k, v, mask=mask, score=ours.position(grid), backend="reference")
    torch.testing.assert_close(ours(x, grid), ours.proj(merge_heads(expected)))


def test_two_blocks_connect_neighbouring_windows():
    grid = Grid(8, 8)
    first, second = attention(window=4), attention(window=4, shift=2)
    one = dependence(first, grid)
    two = dependence(lambda x, g: second(first(x, g), g), grid)
    left, right = (
        grid.ravel([torch.tensor(3), torch.tensor(3)]),
        grid.ravel([torch.tensor(4), torch.tensor(4)]),
    )
    assert not one[left, right]
    assert two[left, right]


def test_windows_need_not_divide_the_map():
    ours = attention(window=4, shift=2)
    assert ours(torch.randn(1, 63, 8, dtype=torch.float64), Grid(7, 9)).isfinite().all()
    assert torch.equal(ours.where(Grid(7, 9)).dense().sum(1)[:2], torch.tensor([4, 4]))


def test_small_maps_shrink_the_window_on_every_axis_and_are_not_shifted():
    where = attention(window=7, shift=3).where(Grid(4, 12))
    assert (where.size, where.shift) == ((4, 4), (0, 0))


def test_block_parameters():
    block = SwinBlock(dim=8, heads=2, window=4, mlp_ratio=2.0)
    attention_part = 8 * 24 + 24 + 8 * 8 + 8 + 2 * 49
    assert sum(p.numel() for p in block.parameters()) == attention_part + 4 * 8 + 8 * 16 + 16 + 16 * 8 + 8


def test_published_blocks_have_the_published_size():
    # The tiny model's 28,288,354 parameters less patch embedding, merging, final norm and head.
    stages = [(96, 3, 2), (192, 6, 2), (384, 12, 6), (768, 24, 2)]
    blocks = sum(
        depth * sum(p.numel() for p in SwinBlock(dim=dim, heads=heads, window=7).parameters())
        for dim, heads, depth in stages
    )
    embedding = 48 * 96 + 96 + 2 * 96
    merging = sum(2 * 4 * d + 4 * d * 2 * d for d in (96, 192, 384))
    head = 2 * 768 + 768 * 1000 + 1000
    assert blocks + embedding + merging + head == 28_288_354


def test_bias_index_is_query_minus_key():
    index = relative_position_index((2, 3))
    assert index[0, 5] == (0 - 1 + 1) * 5 + (0 - 2 + 2)
    assert index[5, 0] == (1 - 0 + 1) * 5 + (2 - 0 + 2)


@pytest.mark.parametrize("shift", [-1, 4, (1, 2, 3)])
def test_bad_shifts_are_named(shift):
    with pytest.raises(ArgumentError, match="shift"):
        WindowAttention(dim=8, heads=2, window=4, shift=shift)


def test_causal_is_refused_with_the_reason():
    with pytest.raises(ArgumentError, match=r"causal.*Not causal: windows look both ways"):
        WindowAttention.for_workload(dim=8, grid=Grid(16), heads=2, causal=True)


def test_layers_alternate_in_a_backbone():
    even = WindowAttention.for_workload(dim=8, grid=Grid(16, 16), heads=2, layer=0)
    odd = WindowAttention.for_workload(dim=8, grid=Grid(16, 16), heads=2, layer=1)
    assert (even.window, even.shift, odd.shift) == ((8, 8), (0, 0), (4, 4))
    assert WindowAttention.for_workload(dim=8, grid=Grid(14, 28), heads=2).window == (7, 7)
