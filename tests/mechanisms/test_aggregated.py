"""TransNeXt's attentions: against the equations written down plainly."""

import pytest
import torch
from torch.nn import functional as F

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.aggregated import AggregatedAttention, CosineAttention, relative_positions
from foveate.mechanisms.projections import split_heads


@pytest.mark.parametrize(
    ("queries", "keys"), [(Grid(4, 6), Grid(2, 3)), (Grid(5, 7), Grid(5, 7)), (Grid(1, 5), Grid(1, 2))]
)
def test_relative_coordinates_are_those_of_every_pair(queries, keys):
    table, index = relative_positions(queries, keys, like=torch.zeros((), dtype=torch.float64))
    assert len(table) == len(table.unique(dim=0))
    axes = [torch.arange(n).double()[None, None] for n in queries]
    means = [F.adaptive_avg_pool1d(axis, n)[0, 0] for axis, n in zip(axes, keys, strict=True)]
    for q in (0, queries.numel - 1, queries.numel // 2):
        for k in (0, keys.numel - 1):
            at = (q // queries[1], q % queries[1])
            of = (means[0][k // keys[1]], means[1][k % keys[1]])
            steps = [(a - b) * 8 / max(n - 1, 1) for a, b, n in zip(at, of, queries, strict=True)]
            expected = torch.stack([torch.sign(s) * torch.log2(s.abs() + 1) / 3 for s in steps])
            torch.testing.assert_close(table[index[q, k]], expected)


def test_a_window_over_the_whole_map_and_a_pool_of_one():
    module, grid = AggregatedAttention(dim=8, heads=2, window=5, pool=3).double(), Grid(3, 3)
    with torch.no_grad():
        module.local_weights.normal_()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    unit = F.normalize(split_heads(module.q(x), 2), dim=-1)
    q = module.scaled(unit, torch.tensor(10.0, dtype=torch.float64).log())
    pooled = module.norm(F.gelu(module.sr(x.transpose(1, 2).unflatten(2, (3, 3)))).mean((2, 3))[:, None])
    keys, values = zip(
        *([split_heads(p, 2) for p in module.kv(t).chunk(2, -1)] for t in (x, pooled)), strict=True
    )
    local, coarse = (q @ F.normalize(k, dim=-1).transpose(2, 3) for k in keys)
    coords = grid.coords()
    steps = coords[None] - coords[:, None] + 2
    offset = steps[..., 0] * 5 + steps[..., 1]
    local = local + module.local_bias[:, offset]
    coarse = coarse + module.cpb(relative_positions(grid, Grid(1, 1), like=x))
    weights = torch.cat([local, coarse], -1).softmax(-1)
    added = (unit @ module.local_tokens + module.local_weights).gather(-1, offset.expand(2, 2, 9, 9))
    out = (weights[..., :9] + added) @ values[0] + weights[..., 9:] @ values[1]
    torch.testing.assert_close(module.mix(x, grid, None, None), out)


def test_temperature_starts_at_its_published_value():
    for module in (CosineAttention(dim=8, heads=2), AggregatedAttention(dim=8, heads=2)):
        torch.testing.assert_close(F.softplus(module.temperature), torch.full((2, 1, 1), 1 / 0.24))


def test_key_counts_follow_the_border():
    _, count = AggregatedAttention(dim=8, heads=2).window_keys(Grid(3, 4))
    assert count.reshape(3, 4).tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]


def test_refuses_what_it_cannot():
    with pytest.raises(ArgumentError, match="window"):
        AggregatedAttention(dim=8, heads=2, window=4)
    with pytest.raises(ArgumentError, match="grid"):
        CosineAttention(dim=8, heads=2)(torch.randn(1, 4, 8), Grid(4))
