"""Agent attention: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.linear.agent_attention import AgentAttention
from foveate.mechanisms.projections import merge_heads, split_heads


def bare(grid, agents, heads=2, dim=8, **options):
    """A layer without biases, convolution or output projection: the operator alone."""
    module = AgentAttention(dim=dim, heads=heads, grid=grid, agents=agents, **options).double()
    for name, parameter in module.named_parameters():
        if name.endswith("_bias") or name.startswith("dwc"):
            nn.init.zeros_(parameter)
    nn.init.eye_(module.proj.weight)
    nn.init.zeros_(module.proj.bias)
    return module


def product_map(module, x):
    """Return P with out = P v, per head, by pushing unit vectors through in place of the values."""
    n, d = x.shape[1], module.dim // module.heads
    columns = []
    with torch.no_grad():
        module.qkv.weight[2 * module.dim :] = 0
        for start in range(n):
            extra = torch.zeros(n, dtype=x.dtype)
            extra[start] = 1
            values = extra[:, None].expand(n, module.dim)
            out = _with_values(module, x, values)
            columns.append(out.unflatten(-1, (module.heads, d))[0, :, :, 0])
    return torch.stack(columns, dim=-1).transpose(0, 1)  # heads, queries, keys


def _with_values(module, x, values):
    qkv = module.qkv

    class Fixed(nn.Module):
        def forward(self, x):
            q, k, _ = qkv(x).chunk(3, dim=-1)
            return torch.cat([q, k, values.expand_as(q)], dim=-1)

    module.qkv = Fixed()
    out = module(x)
    module.qkv = qkv
    return out


def test_the_map_is_row_stochastic_and_of_rank_n():
    module = bare(Grid(4, 4), agents=4)
    p = product_map(module, torch.randn(1, 16, 8, dtype=torch.float64))
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))
    assert (p >= 0).all()
    assert torch.linalg.matrix_rank(p, tol=1e-9).tolist() == [4, 4]


def test_constant_values_stay_constant():
    module = bare(Grid(4, 5), agents=4)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    constant = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(_with_values(module, x, constant), constant.expand_as(x))


def test_as_many_agents_as_tokens_are_the_queries():
    grid = Grid(3, 3)
    module = bare(grid, agents=9)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = (split_heads(part, 2) for part in module.qkv(x).chunk(3, dim=-1))
    expected = attend(q, q, attend(q, k, v))
    torch.testing.assert_close(module(x), merge_heads(expected))


def test_permuting_keys_changes_nothing_without_positions():
    module = bare(Grid(4, 4), agents=16)
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    order = torch.randperm(16)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    nn.init.normal_(module.an_bias)
    nn.init.normal_(module.ah_bias)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])


def test_class_token_gets_no_convolution_and_no_agent():
    module = bare(Grid(4, 4), agents=4, class_token=True)
    nn.init.normal_(module.dwc.weight)
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    with_conv = module(x)
    nn.init.zeros_(module.dwc.weight)
    without = module(x)
    torch.testing.assert_close(with_conv[:, 0], without[:, 0])
    assert not torch.allclose(with_conv[:, 1:], without[:, 1:])


def test_default_is_49_agents_on_a_large_map():
    module = AgentAttention.for_workload(dim=8, grid=Grid(28, 32), heads=2)
    assert module.agents == 49


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"agents": 5}, "agents"),
        ({"agents": 25}, "agents"),
        ({"grid": Grid(16)}, "grid"),
        ({"reduction": 3}, "reduction"),
        ({"reduction": 2, "class_token": True}, "reduction"),
        ({"heads": 3}, "heads"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        AgentAttention(**{"dim": 8, "heads": 2, "grid": Grid(4, 4), "agents": 4, **options})


def test_another_map_is_refused():
    module = AgentAttention(dim=8, heads=2, grid=Grid(4, 4), agents=4)
    with pytest.raises(ArgumentError, match="grid"):
        module(torch.randn(1, 20, 8), Grid(4, 5))
    with pytest.raises(ArgumentError, match="x"):
        module(torch.randn(1, 15, 8))
