"""HiLo: every 'works when' statement of its description, as a test."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.local.hilo import HiLoAttention
from foveate.mechanisms.projections import merge_heads, split_heads


def attention(**options):
    made = HiLoAttention(**{"dim": 12, "heads": 4, "qkv_bias": True, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def tokens(grid, batch=2, dim=12):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def dependence(module, grid, channels):
    """Which outputs depend on which inputs, (N, N) bool, by the gradient of some channels."""
    x = tokens(grid, 1).requires_grad_()
    out = module(x, grid)[0, :, channels]
    rows = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0][0] for row in out]
    return torch.stack(rows).abs().amax(-1) > 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_windows_of_one_token_are_plain_attention(alpha):
    ours, grid = attention(window=1, alpha=alpha), Grid(5, 7)
    assert (ours.high_heads, ours.low_heads) == (0, 4)
    x = tokens(grid)
    k, v = (split_heads(part, 4) for part in ours.low_kv(x).chunk(2, -1))
    dense = attend(split_heads(ours.low_q(x), 4), k, v, backend="reference")
    torch.testing.assert_close(ours(x, grid), ours.low_proj(merge_heads(dense)))


@pytest.mark.parametrize("sizes", [(6, 9), (5, 7)])
def test_without_low_heads_it_is_window_attention(sizes):
    ours, grid = attention(window=3, alpha=0.0), Grid(*sizes)
    assert not hasattr(ours, "low_q")
    x, place = tokens(grid), grid.coords() // 3
    inside = (place[:, None] == place[None]).all(-1)
    q, k, v = (split_heads(part, 4) for part in ours.high_qkv(x).chunk(3, -1))
    dense = attend(q, k, v, mask=inside, backend="reference")
    torch.testing.assert_close(ours(x, grid), ours.high_proj(merge_heads(dense)))


@pytest.mark.parametrize(("sizes", "window"), [((6, 8), 2), ((5, 7), 2), ((5, 7), 3)])
def test_without_high_heads_keys_are_average_pooled(sizes, window):
    ours, grid = attention(window=window, alpha=1.0), Grid(*sizes)
    assert not hasattr(ours, "high_qkv")
    x = tokens(grid)
    maps = x.transpose(1, 2).unflatten(2, sizes)
    means = functional.avg_pool2d(maps, window, window, ceil_mode=True).flatten(2).transpose(1, 2)
    k, v = (split_heads(part, 4) for part in ours.low_kv(means).chunk(2, -1))
    dense = attend(split_heads(ours.low_q(x), 4), k, v, backend="reference")
    torch.testing.assert_close(ours(x, grid), ours.low_proj(merge_heads(dense)))


def test_a_constant_image_stays_constant_and_low_heads_give_their_value():
    ours, grid = attention(), Grid(6, 8)
    x = tokens(Grid(1), 1).expand(1, grid.numel, -1)
    out = ours(x, grid)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    value = ours.low_kv(x).chunk(2, -1)[1]
    torch.testing.assert_close(out[..., 6:], ours.low_proj(value))


def test_high_heads_stay_inside_their_window_and_low_heads_reach_everywhere():
    ours, grid = attention(window=3), Grid(6, 6)
    place = grid.coords() // 3
    inside = (place[:, None] == place[None]).all(-1)
    assert torch.equal(dependence(ours, grid, slice(0, 6)), inside)
    assert dependence(ours, grid, slice(6, 12)).all()


@pytest.mark.parametrize(("alpha", "low"), [(0.0, 0), (0.24, 0), (0.49, 1), (0.9, 3), (1.0, 4)])
def test_the_number_of_low_heads_is_rounded_down(alpha, low):
    ours = attention(alpha=alpha)
    assert (ours.high_heads, ours.low_heads) == (4 - low, low)
    assert ours(tokens(Grid(4, 4)), Grid(4, 4)).shape == (2, 16, 12)


def test_there_is_no_common_projection():
    high, low = 6, 6
    count = 12 * 3 * high + 3 * high + high * high + high
    count += 12 * low + low + 12 * 2 * low + 2 * low + low * low + low
    assert sum(p.numel() for p in attention().parameters()) == count


@pytest.mark.parametrize("side", [8, 16, 32])
def test_pairs_are_those_of_windows_and_of_one_mean_per_window(side):
    grid, n = Grid(side, side), side * side
    module = attention(window=4)
    high = explain((1, 2, n, 3), (1, 2, n, 3), (1, 2, n, 3), where=module.where(grid))
    assert high.pairs_needed == 2 * n * 16
    low = explain((1, 2, n, 3), (1, 2, n // 16, 3), (1, 2, n // 16, 3))
    assert low.pairs_needed == 2 * n * n // 16


def test_windows_per_axis_and_other_numbers_of_axes():
    ours = attention(window=(2, 3))
    assert ours.where(Grid(4, 9)).size == (2, 3)
    assert attention(window=2)(tokens(Grid(3, 4, 5)), Grid(3, 4, 5)).shape == (2, 60, 12)
    with pytest.raises(ArgumentError, match="grid"):
        ours(tokens(Grid(8)), Grid(8))


def test_backends_agree_in_half_precision():
    torch.manual_seed(0)
    ours = attention().to(torch.bfloat16)
    x, grid = tokens(Grid(7, 9)).to(torch.bfloat16), Grid(7, 9)
    fast = ours(x, grid)
    ours.backend = "reference"
    torch.testing.assert_close(fast, ours(x, grid), rtol=3e-2, atol=3e-2)


def test_bad_options_are_named():
    for options, message in (
        ({"window": 0}, "^window"),
        ({"window": (2, 0)}, "^window"),
        ({"alpha": 1.5}, "^alpha"),
        ({"heads": 5}, "^dim"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attention(**options)
    with pytest.raises(ArgumentError, match=r"causal.*Not causal"):
        HiLoAttention.for_workload(dim=12, grid=Grid(16), heads=4, causal=True)


def test_a_scale_replaces_the_default():
    torch.manual_seed(0)
    x, grid = tokens(Grid(4, 4)), Grid(4, 4)
    ours = attention()
    same = attention(scale=3**-0.5)
    same.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, grid), same(x, grid))
