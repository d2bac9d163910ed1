"""Outlook attention: every 'works when' statement of its description, as a test."""

import math

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.local.volo import OutlookAttention, Outlooker


def attention(**options):
    made = OutlookAttention(**{"dim": 12, "heads": 3, "qkv_bias": True, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def tokens(grid, batch=2, dim=12):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def as_map(x, grid):
    return x.transpose(1, 2).unflatten(2, grid.sizes)


def as_tokens(x):
    return x.flatten(2).transpose(1, 2)


def blank(module, bias):
    """Let every anchor write `bias`, a (K^2, K^2) matrix, whatever it sees."""
    with torch.no_grad():
        module.weights.weight.zero_()
        module.weights.bias.copy_(bias.flatten().repeat(module.heads))
    return module


@pytest.mark.parametrize("sizes", [(7, 5), (8, 6)])
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (5, 1), (5, 3), (2, 2)])
def test_against_unfolding_and_folding(sizes, window, stride):
    padding = 0 if window == 2 else window // 2
    ours, grid = attention(window=window, stride=stride, padding=padding), Grid(*sizes)
    x, box = tokens(grid), window * window
    # torch makes as few boxes as fit; zeros beyond the far border make room for one per anchor.
    counts = [math.ceil(n / stride) for n in sizes]
    canvas = [(c - 1) * stride + window for c in counts]
    below, right = (max(c - n - padding, 0) for c, n in zip(canvas, sizes, strict=True))
    v = functional.pad(as_map(ours.v(x), grid), (padding, right, padding, below))
    boxes = functional.unfold(v, window, stride=stride).reshape(2, 3, 4, box, -1)
    anchors = functional.avg_pool2d(as_map(x, grid), stride, stride, ceil_mode=True)
    weights = (ours.weights(as_tokens(anchors)).reshape(2, -1, 3, box, box) / 2).softmax(-1)
    mixed = torch.einsum("bahrc,bhdca->bhdra", weights, boxes).reshape(2, 12 * box, -1)
    folded = functional.fold(mixed, v.shape[2:], window, stride=stride)
    inside = folded[:, :, padding : padding + sizes[0], padding : padding + sizes[1]]
    torch.testing.assert_close(ours(x, grid), ours.proj(as_tokens(inside)))


def test_identity_weights_count_the_windows_of_a_pixel():
    ours, grid = blank(attention(), 1e4 * torch.eye(9)), Grid(5, 6)
    x = tokens(grid)
    count = torch.full(grid.sizes, 9.0, dtype=torch.float64)
    count[[0, -1]] = 6
    count[:, [0, -1]] = 6
    count[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    torch.testing.assert_close(ours(x, grid), ours.proj(ours.v(x) * count.flatten()[:, None]))


def test_uniform_weights_are_two_box_filters():
    ours, grid = blank(attention(), torch.zeros(9, 9)), Grid(6, 7)
    x = tokens(grid)
    # Windows average what they find, zeros of the border included; every token sums its windows' means.
    once = functional.avg_pool2d(as_map(ours.v(x), grid), 3, 1, 1)
    twice = 9 * functional.avg_pool2d(once, 3, 1, 1)
    torch.testing.assert_close(ours(x, grid), ours.proj(as_tokens(twice)))


def test_linear_in_the_values():
    ours, grid = attention(), Grid(4, 5)
    x = tokens(grid)
    first = ours(x, grid) - ours.proj.bias
    with torch.no_grad():
        ours.v.weight.mul_(3)
        ours.v.bias.mul_(3)
    torch.testing.assert_close(ours(x, grid) - ours.proj.bias, 3 * first)


@pytest.mark.parametrize("stride", [1, 2])
def test_moving_the_input_by_the_stride_moves_the_interior(stride):
    ours, grid = attention(stride=stride), Grid(10, 12)
    x = torch.randn(1, 10 + stride, 12, 12, dtype=torch.float64)
    before = ours(x[:, :10].flatten(1, 2), grid).unflatten(1, grid.sizes)
    after = ours(x[:, stride:].flatten(1, 2), grid).unflatten(1, grid.sizes)
    rim = 4
    torch.testing.assert_close(after[:, rim - stride : -rim], before[:, rim : stride - rim])


def test_a_window_of_one_token_is_a_projection():
    ours, grid = attention(window=1), Grid(3, 4)
    x = tokens(grid)
    torch.testing.assert_close(ours(x, grid), ours.proj(ours.v(x)))


def test_one_window_over_the_map_is_dense_with_the_written_weights():
    ours, grid = attention(window=4, stride=4, padding=0), Grid(4, 4)
    x = tokens(grid)
    dense = ours.outlook(x, grid)[:, :, 0]
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 3, 16, dtype=torch.float64))
    v = ours.v(x).unflatten(2, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(ours(x, grid), ours.proj((dense @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("stride", [1, 2])
def test_pairs_grow_with_the_map(stride):
    counts = [
        attention(stride=stride).where(Grid(side, side)).schedule().pairs_computed for side in (8, 16, 32)
    ]
    assert counts == [81 * (side // stride) ** 2 for side in (8, 16, 32)]


def test_weights_of_the_authors_form():
    ours = OutlookAttention(dim=192, heads=6)
    assert ours.weights.weight.shape == (6 * 81, 192)
    assert ours.v.bias is None
    assert ours.weights.bias is not None


def test_the_smallest_published_model_has_the_published_size():
    # VOLO-D1: stem, four outlookers, merging, positions, 14 transformer and two class blocks, heads.
    outlookers = 4 * sum(p.numel() for p in Outlooker(dim=192, heads=6).parameters())
    stem = 64 * 3 * 49 + 2 * 64 * 64 * 9 + 3 * 2 * 64 + 192 * 64 * 16 + 192
    merging, positions = 384 * 192 * 4 + 384, 14 * 14 * 384
    mlp = 2 * 384 * 1152 + 1152 + 384
    block = 4 * 384 * 384 + 384 + mlp + 4 * 384
    heads = 384 + 2 * 384 + 2 * (384 * 1000 + 1000)
    assert outlookers + stem + merging + positions + 16 * block + heads == 26_632_040


def test_other_numbers_of_axes():
    for sizes in ((9,), (3, 4, 5)):
        grid = Grid(*sizes)
        ours = attention(window=(3,) * grid.ndim, stride=2)
        assert ours(tokens(grid), grid).shape == (2, grid.numel, 12)
    with pytest.raises(ArgumentError, match=r"^grid"):
        attention()(tokens(Grid(9)), Grid(9))


def test_half_precision_stays_near():
    torch.manual_seed(0)
    ours, grid = attention(), Grid(5, 7)
    x = tokens(grid)
    want = ours(x, grid)
    low = ours.to(torch.bfloat16)(x.to(torch.bfloat16), grid)
    torch.testing.assert_close(low.double(), want, rtol=5e-2, atol=0.2)


def test_bad_options_are_named():
    for options, message in (
        ({"window": 0}, "^window"),
        ({"stride": 4}, "^stride.*left out"),
        ({"stride": 3}, "^padding"),
        ({"padding": 3}, "^padding"),
        ({"padding": (1, 1, 1)}, "^padding"),
        ({"heads": 5}, "^dim"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attention(**options)
    with pytest.raises(ArgumentError, match=r"causal.*Not causal"):
        OutlookAttention.for_workload(dim=12, grid=Grid(16), heads=3, causal=True)
