"""VSA: every 'works when' statement of its description, as a test."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, grid_sample, leaky_relu, pad

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.mechanisms.local.swin import WindowAttention, relative_position_index, window_tokens
from foveate.mechanisms.local.varied_size_window import VariedSizeWindowAttention, reference_points
from foveate.mechanisms.projections import merge_heads, split_heads

PREDICTORS = ("offsets", "scales")


def attention(*, predictors=0.0, **options):
    """Every parameter random, those of the predictors with this standard deviation."""
    made = VariedSizeWindowAttention(**({"dim": 8, "heads": 2, "window": 3} | options)).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(std=predictors if name.split(".")[0] in PREDICTORS else 0.3)
    return made


def tokens(grid, batch=2, dim=8):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def plain(module, x, grid):
    """The authors' steps on padded maps, in coordinates from -1 to 1, one window after another."""
    m, heads = module.window[0], module.heads
    h, w = grid
    h2, w2 = -(-h // m) * m, -(-w // m) * m
    image = x.unflatten(1, grid.sizes).movedim(-1, 1)
    features = leaky_relu(avg_pool2d(pad(image, (0, w2 - w, 0, h2 - h)), m))

    def predict(layer):
        return layer(features.movedim(1, -1)).movedim(-1, 1).reshape(-1, 2, h2 // m, w2 // m)

    divisor = torch.tensor([w // m, h // m]).view(1, 2, 1, 1)
    offset, scale = predict(module.offsets) / divisor, predict(module.scales)
    base, coords = (c.double() for c in reference_points(grid, module.window))
    at = base + coords * scale[:, :, :, None, :, None] + offset[:, :, :, None, :, None]
    at = at.permute(0, 2, 3, 4, 5, 1).reshape(-1, h2, w2, 2)
    q, k, v = (split_heads(y, heads) for y in module.qkv(x).chunk(3, -1))
    maps = [pad(y.flatten(0, 1).mT.unflatten(2, grid.sizes), (0, w2 - w, 0, h2 - h)) for y in (q, k, v)]
    k, v = (grid_sample(y, at, align_corners=True) for y in maps[1:])
    q, k, v = (y.flatten(2).mT.unflatten(0, (-1, heads)) for y in (maps[0], k, v))
    bias = module.position.table.flatten(1)[:, relative_position_index((m, m))]
    out = torch.zeros_like(q)
    for ids in window_tokens(Grid(h2, w2), (m, m), (0, 0)):
        logits = q[:, :, ids] @ k[:, :, ids].mT * q.shape[-1] ** -0.5 + bias
        out[:, :, ids] = logits.softmax(-1) @ v[:, :, ids]
    out = merge_heads(out).unflatten(1, (h2, w2))[:, :h, :w]
    return module.proj(out.flatten(1, 2))


@pytest.mark.parametrize("grid", [Grid(6, 9), Grid(3, 3)])
def test_with_silent_predictors_it_is_window_attention(grid):
    ours = attention()
    swin = WindowAttention(dim=8, heads=2, window=3).double()
    swin.load_state_dict({n: p for n, p in ours.state_dict().items() if n.split(".")[0] not in PREDICTORS})
    x = tokens(grid)
    torch.testing.assert_close(ours(x, grid), swin(x, grid), rtol=1e-12, atol=1e-12)


def test_predictors_start_silent():
    made = VariedSizeWindowAttention(dim=8, heads=2)
    assert not any(p.any() for name in PREDICTORS for p in getattr(made, name).parameters())


@pytest.mark.parametrize("grid", [Grid(6, 9), Grid(7, 8), Grid(10, 4)])
def test_equals_the_authors_steps_on_maps_that_windows_do_and_do_not_divide(grid):
    ours, x = attention(predictors=0.5), tokens(grid)
    torch.testing.assert_close(ours(x, grid), plain(ours, x, grid), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("axis", "neighbour"), [(0, 1), (1, 3)])
def test_an_offset_of_one_window_reads_the_neighbours_keys(axis, neighbour):
    grid, ours = Grid(9, 9), attention()
    x = tokens(grid)
    with torch.no_grad():
        # Of (x, y) per head: one window is 3 pixels, the unit (9 - 1) / 2 / 3.
        ours.offsets.bias.view(2, 2)[:, axis] = 3 / (8 / 2 / 3)
    out = ours(x, grid)
    ids = window_tokens(grid, (3, 3), (0, 0))
    q, k, v = (split_heads(y, 2) for y in ours.qkv(x).chunk(3, -1))
    bias = ours.position.table.flatten(1)[:, relative_position_index((3, 3))]
    here, there = ids[0], ids[neighbour]
    weights = (q[:, :, here] @ k[:, :, there].mT / 2 + bias).softmax(-1)
    expected = ours.proj(merge_heads(weights @ v[:, :, there]))
    torch.testing.assert_close(out[:, here], expected)
    # Beyond the border there are zeros, which count but add nothing.
    torch.testing.assert_close(out[:, ids[8]], ours.proj.bias.expand(2, 9, 8))


def test_the_factor_counts_on_top_of_one():
    grid, ours = Grid(6, 6), attention()
    x = tokens(grid)
    with torch.no_grad():
        ours.scales.bias.fill_(-1)
    ids = window_tokens(grid, (3, 3), (0, 0))
    v = ours.qkv(x).chunk(3, -1)[2]
    expected = ours.proj(v[:, ids[:, 4]])  # every key is the middle one
    torch.testing.assert_close(ours(x, grid)[:, ids], expected[:, :, None].expand(-1, -1, 9, -1))


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_gradients_reach_the_predictors(std):
    ours, grid = attention(predictors=std), Grid(6, 6)
    ours(tokens(grid), grid).square().sum().backward()
    for name in PREDICTORS:
        for p in getattr(ours, name).parameters():
            assert p.grad.abs().max() > 0


def test_heads_move_their_windows_independently():
    ours, grid, x = attention(predictors=0.2), Grid(6, 6), tokens(Grid(6, 6))
    ours.proj = torch.nn.Identity()
    before = ours(x, grid)
    with torch.no_grad():
        for name in PREDICTORS:
            getattr(ours, name).bias[2:] += 0.5  # (x, y) of the second head
    after = ours(x, grid)
    assert torch.equal(after[..., :4], before[..., :4])
    assert not torch.isclose(after[..., 4:], before[..., 4:]).all(-1).any()


@pytest.mark.parametrize(("sizes", "window"), [((12,), (4,)), ((4, 4, 6), (2, 2, 3))])
def test_windows_move_on_maps_of_one_and_three_axes(sizes, window):
    """Moving the windows of the keys equals moving the keys: the same shift of a map that repeats."""
    grid, ours = Grid(*sizes), attention(window=window)
    x = tokens(Grid(*sizes[:-1], window[-1])).unflatten(1, (*sizes[:-1], window[-1]))
    x = x.repeat(*[1] * len(sizes), sizes[-1] // window[-1], 1).flatten(1, -2)
    before = ours(x, grid).unflatten(1, sizes)
    with torch.no_grad():
        # x is the last axis and comes first; its unit is (n - 1) / 2 / windows.
        unit = (sizes[-1] - 1) / 2 / (sizes[-1] // window[-1])
        ours.offsets.bias.view(2, -1)[:, 0] = window[-1] / unit
    after = ours(x, grid).unflatten(1, sizes)
    torch.testing.assert_close(after[..., : -window[-1], :], before[..., : -window[-1], :])
    torch.testing.assert_close(
        after[..., -window[-1] :, :], ours.proj.bias.expand_as(after[..., -window[-1] :, :])
    )


def test_pairs_grow_linearly():
    counts = []
    for side in (14, 28, 56):
        grid = Grid(side, side)
        module = VariedSizeWindowAttention(dim=8, heads=2)
        q = torch.zeros(1, 2, grid.numel, 4)
        counts.append(explain(q, q, q, where=module.windows(grid)).pairs_needed)
    assert counts == [2 * side**2 * 49 for side in (14, 28, 56)]


def test_other_output_channels_and_half_precision():
    grid = Grid(5, 7)
    wide = attention(predictors=0.3, out_dim=12)
    assert wide(tokens(grid), grid).shape == (2, 35, 12)
    ours, x = attention(predictors=0.3).float(), tokens(grid).float()
    exact, half = ours(x, grid), ours.bfloat16()(x.bfloat16(), grid)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert ours.positions(x.bfloat16(), grid).dtype == torch.float32


def test_refusals_name_the_argument():
    grid = Grid(6, 6)
    with pytest.raises(ArgumentError, match=r"^grid: expected a grid with 2 axes"):
        attention()(tokens(grid), Grid(36))
    with pytest.raises(ArgumentError, match="multiple of heads=2"):
        VariedSizeWindowAttention(dim=8, heads=2, out_dim=9)
    with pytest.raises(ArgumentError, match=r"Grid: expected positive integers"):
        VariedSizeWindowAttention(dim=8, heads=2, window=0)
    with pytest.raises(ArgumentError, match=r"^causal"):
        VariedSizeWindowAttention.for_workload(dim=8, grid=grid, heads=2, causal=True)
