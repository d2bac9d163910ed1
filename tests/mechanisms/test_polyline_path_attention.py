"""Polyline path masked attention: limit cases, paths against a walk, and the fast form."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.scan.watch import watch_scans
from foveate.mechanisms.layout import AsTokens
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.scored.polyline_path_attention import (
    PolylinePathAttention,
    PolylinePathBlock,
)
from foveate.patterns.grids import Windows
from foveate.scores.distance import DistanceDecay
from foveate.scores.rotary import rotate

GRID = Grid(4, 5)


def layer(form="whole", dim=12, heads=3, seed=0) -> PolylinePathAttention:
    torch.manual_seed(seed)
    module = PolylinePathAttention(dim=dim, heads=heads, form=form).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def tokens(grid=GRID, dim=12, batch=2):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def rotated(module, x, grid):
    q, k, v = module.qkv(x)
    cos, sin = module.rotation(grid)
    return rotate(q, cos, sin, "interleaved"), rotate(k, cos, sin, "interleaved"), v


def finished(module, mixed, v, grid):
    """What follows the attention: the local convolution of the values and the projection."""
    return module.proj(merge_heads(mixed) + AsTokens(module.lepe)(merge_heads(v), grid))


def test_without_decay_whole_is_softmax_attention():
    module, x = layer(), tokens()
    nn.init.constant_(module.factors.log_rate, -1e4)
    q, k, v = rotated(module, x, GRID)
    torch.testing.assert_close(module(x, GRID), finished(module, attend(q, k, v), v, GRID))


def test_without_decay_chunk_is_rows_times_columns():
    module, x = layer("chunk"), tokens()
    nn.init.constant_(module.factors.log_rate, -1e4)
    q, k, v = rotated(module, x, GRID)

    def inside(size):
        allowed = Windows(GRID, size).dense()
        return (q @ k.mT * 2**-1.0).masked_fill(~allowed, -torch.inf).softmax(-1)

    rows, columns = inside((1, 5)), inside((4, 1))
    mixed = 0.5 * (columns @ (rows @ v)) + 0.5 * (rows @ (columns @ v))
    torch.testing.assert_close(module(x, GRID), finished(module, mixed, v, GRID))


def test_constant_steps_are_manhattan_decay():
    module, x = layer(), tokens()
    nn.init.zeros_(module.factors.steps.weight)
    steps = nn.functional.softplus(module.factors.bias) * module.factors.log_rate.exp()
    q, k, v = rotated(module, x, GRID)
    mixed = attend(q, k, v, score=DistanceDecay(steps, GRID))
    torch.testing.assert_close(module(x, GRID), finished(module, mixed, v, GRID))


def test_steps_are_read_per_head_from_its_channels():
    module, x = layer(), tokens()
    across, down = module.factors(x)
    head = split_heads(x, 3)[:, 1] @ module.factors.steps.weight.T + module.factors.bias[1]
    rate = module.factors.log_rate[1].exp()
    torch.testing.assert_close(across[:, 1], -rate * nn.functional.softplus(head[..., 0]))
    torch.testing.assert_close(down[:, 1], -rate * nn.functional.softplus(head[..., 1]))
    changed = x.clone()
    changed[..., :4] += 1  # the channels of head 0
    assert torch.equal(module.factors(changed)[0][:, 1:], across[:, 1:])


def test_mask_equals_a_walk_along_the_polyline():
    module, x = layer(), tokens(batch=1)
    across, down = (part[0, 2].exp().reshape(4, 5).tolist() for part in module.factors(x))
    got = module.log_mask(x, GRID)[0, 2].exp().tolist()
    for q in range(20):
        for k in range(20):
            (y, column), (to_y, to_column) = divmod(q, 5), divmod(k, 5)
            product = 1.0
            for stop in range(min(column, to_column) + 1, max(column, to_column) + 1):
                product *= across[y][stop]  # in the query's row
            for stop in range(min(y, to_y) + 1, max(y, to_y) + 1):
                product *= down[stop][to_column]  # in the key's column
            assert got[q][k] == pytest.approx(product, rel=1e-11)


@pytest.mark.parametrize("grid", [Grid(1, 7), Grid(7, 1)], ids=str)
def test_on_a_line_both_softmaxes_coincide(grid):
    module, x = layer(), tokens(grid)
    mask = module.log_mask(x, grid)
    torch.testing.assert_close(mask, mask.mT)
    q, k, v = rotated(module, x, grid)
    mixed = (q @ k.mT * 2**-1.0 + mask).softmax(-1) @ v
    torch.testing.assert_close(module(x, grid), finished(module, mixed, v, grid))
    chunk = layer("chunk")
    if grid[0] == 1:  # alone in its column, a token passes its value on: rows only
        torch.testing.assert_close(chunk(x, grid), finished(module, mixed, v, grid))


def test_two_softmaxes_are_averaged_not_two_masks():
    module, x = layer(), tokens()
    mask = module.log_mask(x, GRID)
    assert not torch.allclose(mask, mask.mT)
    q, k, v = rotated(module, x, GRID)
    logits = q @ k.mT * 2**-1.0
    average = (logits + (mask + mask.mT) / 2).softmax(-1) @ v
    right = 0.5 * (logits + mask).softmax(-1) @ v + 0.5 * (logits + mask.mT).softmax(-1) @ v
    got = module(x, GRID)
    torch.testing.assert_close(got, finished(module, right, v, GRID))
    assert not torch.allclose(got, finished(module, average, v, GRID), atol=1e-4)


def test_linear_form_equals_its_n_by_n_product():
    module, x = layer("linear"), tokens()
    q, k, v = rotated(module, x, GRID)
    mask = module.log_mask(x, GRID)
    mixed = 0.5 * ((mask.exp() + mask.mT.exp()) * (q @ k.mT) * 2**-1.0) @ v
    torch.testing.assert_close(module(x, GRID), finished(module, mixed, v, GRID))


def test_linear_form_costs_as_much_per_token_at_every_size():
    prices = []
    for side in (4, 8, 16):
        grid = Grid(side, side)
        with watch_scans() as scans:
            layer("linear")(tokens(grid), grid)
        prices.append(sum(s.batch * s.heads * s.n * s.dv for s in scans) / grid.numel)
    assert len(set(prices)) == 1


def test_chunk_needs_rows_and_columns_only():
    for side in (8, 16, 32):
        shape = (1, 2, side * side, 8)
        rows = explain(shape, shape, shape, where=Windows((side, side), (1, side)))
        assert rows.pairs_needed == 2 * side**3
        assert rows.pairs_dense == 2 * side**4


def test_workload_takes_the_published_form_of_its_size():
    build = PolylinePathAttention.for_workload
    assert build(dim=16, grid=Grid(14, 14), heads=2).form == "whole"
    assert build(dim=16, grid=Grid(28, 28), heads=2).form == "chunk"


def test_low_precision_stays_near():
    module, x = layer(), tokens()
    truth = module(x, GRID)
    got = module.to(torch.bfloat16)(x.to(torch.bfloat16), GRID)
    assert (got.double() - truth).abs().max() < 0.05 * truth.abs().max()


def test_initial_steps_are_between_a_thousandth_and_a_tenth():
    torch.manual_seed(0)
    factors = PolylinePathAttention(dim=64, heads=32).factors
    steps, rates = nn.functional.softplus(factors.bias).tolist(), factors.log_rate.exp().tolist()
    assert 1e-3 - 1e-6 <= min(steps) < max(steps) <= 0.1 + 1e-6
    assert 1.0 <= min(rates) < max(rates) <= 1.1 + 1e-6


def test_block_scales_its_branches():
    x = tokens(dim=8)
    block = PolylinePathBlock(dim=8, heads=2, hidden=16, layer_scale=0.0).double()
    torch.testing.assert_close(block(x, GRID), x + AsTokens(block.position)(x, GRID))
    plain = PolylinePathBlock(dim=8, heads=2, hidden=16, form="chunk").double()
    assert plain.scale1 is None
    assert plain(x, GRID).shape == x.shape


def test_refusals_name_the_argument():
    with pytest.raises(ArgumentError, match="heads"):
        PolylinePathAttention(dim=9, heads=3)
    with pytest.raises(ArgumentError, match="form"):
        PolylinePathAttention(dim=8, heads=2, form="cross")
    with pytest.raises(ArgumentError, match="grid"):
        PolylinePathAttention.for_workload(dim=8, grid=Grid(16), heads=2)
    with pytest.raises(ArgumentError, match="causal"):
        PolylinePathAttention.for_workload(dim=8, grid=Grid(4, 4), heads=2, causal=True)
