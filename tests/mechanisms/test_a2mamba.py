"""A2Mamba's mixer: what its equations promise."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu, softplus

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.scan import selective_scan, selective_states
from foveate.mechanisms.linear.a2mamba import A2Mamba, MixedStates
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.scores.bias import Bias


def layer(**options):
    module = A2Mamba(dim=16, heads=4, **{"window": 3, **options}).double().eval()
    for name, parameter in module.named_parameters():
        if "norm" not in name and name != "ssm.A_log":
            nn.init.normal_(parameter, std=0.3)
    return module


def image(*size, batch=2):
    return torch.randn(batch, 16, *size, dtype=torch.float64)


def bare(module):
    """Without the convolution, the gate and the norms' second half: what comes out is LN(LN(z))."""
    nn.init.zeros_(module.lepe.weight)
    nn.init.zeros_(module.lepe.bias)
    nn.init.eye_(module.proj[1].weight[:, :, 0, 0])
    nn.init.zeros_(module.proj[1].bias)
    module.gate = nn.Sequential(_One())
    return module


class _One(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


def halves(module, x):
    """Turned queries and keys, and values, as (B, H, N, D)."""
    q, k, v = (split_heads(part.mT, 4) for part in module.qkv(x).flatten(2).chunk(3, dim=1))
    cos, sin = (t.repeat_interleave(2, -1) for t in module.turns(Grid(*x.shape[2:]), x))

    def rope(y):
        return y * cos + torch.stack([-y[..., 1::2], y[..., 0::2]], -1).flatten(-2) * sin

    return rope(q), rope(k), v


def finish(module, z, x):
    z = z.mT.unflatten(2, x.shape[2:])
    return module.proj[0](module.norm(z))


def test_one_hot_maps_leave_a_plain_state_space():
    module, x = bare(layer()), image(6, 7)
    nn.init.dirac_(module.ssm.state_fusion.weight)
    nn.init.zeros_(module.ssm.state_fusion.bias)
    with torch.no_grad():
        module.table.zero_()
        module.table[:, 2, 2] = 1e4
    _, _, v = halves(module, x)
    y = merge_heads(torch.cat([v[:, :2], v[:, :2] + v[:, 2:]], 1)).mT.unflatten(2, (6, 7))
    ssm = module.ssm
    u = silu(ssm.conv(y)).flatten(2).mT
    dt, b, c = ssm.x_proj(u).split([1, 1, 1], -1)
    dt, A = softplus(ssm.dt_proj(dt)), -ssm.A_log.exp()[None]
    z = selective_scan(*(t.unsqueeze(1) for t in (u, dt)), A, b[:, None], c[:, None], D=ssm.D[None]).squeeze(
        1
    )
    torch.testing.assert_close(module(x), finish(module, z, x))


def test_maps_mix_values_and_states_alike():
    module, x = bare(layer()), image(6, 9)
    q, k, v = halves(module, x)
    grid = Grid(6, 9)
    near, far = module.neighborhoods(grid)
    assert (near.dilation, far.dilation) == ((1, 1), (2, 3))

    def dense(part, where):  # the softmax map, written out from offsets
        coords = grid.coords()
        offset = coords[None] - coords[:, None]
        step = torch.tensor(where.dilation)
        index = (offset.div(step, rounding_mode="floor") + 2).clamp(0, 4)
        logits = q[:, part] @ k[:, part].mT / 2 + module.table[:, index[..., 0], index[..., 1]]
        return logits.masked_fill(~where.dense(), -torch.inf).softmax(-1)

    a1, a2 = dense(slice(0, 2), near), dense(slice(2, 4), far)
    y1 = a1 @ v[:, :2]
    y = merge_heads(torch.cat([y1, a2 @ (y1 + v[:, 2:])], 1)).mT.unflatten(2, (6, 9))
    ssm = module.ssm
    u = silu(ssm.conv(y)).flatten(2).mT
    dt, b, c = ssm.x_proj(u).split([1, 1, 1], -1)
    h, rows = torch.zeros(2, 16, dtype=torch.float64), []
    dt = softplus(ssm.dt_proj(dt))
    for t in range(54):
        h = torch.exp(-dt[:, t] * ssm.A_log.exp()[:, 0]) * h + dt[:, t] * b[:, t] * u[:, t]
        rows.append(h)
    h = split_heads(torch.stack(rows, 1), 4)
    s = torch.cat([a1 @ h[:, :2], a2 @ h[:, 2:]], 1)
    s = torch.einsum("gh,bhnd->bgnd", ssm.state_fusion.weight[:, :, 0, 0], s)
    s = merge_heads(s + ssm.state_fusion.bias[None, :, None, None])
    torch.testing.assert_close(module(x), finish(module, s * c + u * ssm.D, x))


def test_a_window_as_large_as_the_map_is_full_attention():
    module, x = bare(layer(window=5, form="global", bias=False)), image(5, 5)
    q, k, v = halves(module, x)
    near = attend(q[:, :2], k[:, :2], v[:, :2])
    y = torch.cat([near, attend(q[:, 2:], k[:, 2:], near + v[:, 2:])], 1)
    # The global form is multi-head attention over values that are mixed already.
    torch.testing.assert_close(module(x), finish(module, merge_heads(attend(q, k, y)), x))


def test_the_global_bias_counts_and_is_stretched_to_other_maps():
    module, x = bare(layer(window=4, form="global", grid=Grid(4, 4))), image(4, 4)
    with torch.no_grad():
        module.table.zero_()
    q, k, v = halves(module, x)
    near = attend(q[:, :2], k[:, :2], v[:, :2])
    y = torch.cat([near, attend(q[:, 2:], k[:, 2:], near + v[:, 2:])], 1)
    z = attend(q, k, y, score=Bias(module.pair_bias))
    torch.testing.assert_close(module(x), finish(module, merge_heads(z), x))
    assert module(image(5, 6)).shape == (2, 16, 5, 6)


def test_states_are_linear_in_what_enters_them():
    u, other = torch.randn(2, 1, 1, 12, 4, dtype=torch.float64).unbind(0)
    dt, b = torch.rand(1, 1, 12, 4, dtype=torch.float64), torch.randn(1, 1, 12, 1, dtype=torch.float64)
    A = -torch.rand(1, 4, 1, dtype=torch.float64)
    both = selective_states(u + 2 * other, dt, A, b)
    torch.testing.assert_close(both, selective_states(u, dt, A, b) + 2 * selective_states(other, dt, A, b))


def test_the_state_space_reads_row_by_row_and_one_way():
    ssm = MixedStates(dim=8, heads=2).double()
    nn.init.zeros_(ssm.conv.weight)
    with torch.no_grad():
        ssm.conv.weight[:, :, 2, 2] = 1  # nothing but the states may carry anything
    y = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    changed = y.clone()
    changed[..., 1, 2] += 1
    one = nn.Identity()
    moved = (ssm(changed, one, one) - ssm(y, one, one)).abs().amax((0, 1)).flatten() > 1e-12
    assert moved.tolist() == [False] * 6 + [True] * 6


def test_both_halves_share_one_table():
    module = layer()
    assert [name for name, _ in module.named_parameters() if "table" in name] == ["table"]
    assert module.table.shape == (2, 5, 5)


def test_dilated_first_half_as_published_lays_weights_on_other_states():
    x = image(7, 8)
    ours, theirs = layer(dilation=2), layer(dilation=2, official=True)
    theirs.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(x), theirs(x))
    plain, same = layer(), layer(official=True)
    same.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x), same(x), rtol=0, atol=0)


def test_misplaced_weights_keep_their_order():
    module, x = layer(dilation=2), image(7, 8)
    q, k, _ = halves(module, x)
    grid = Grid(7, 8)
    unit = torch.eye(56, dtype=torch.float64).expand(2, 2, 56, 56)
    dilated = module._maps(q, k, grid)[0](unit)
    moved = module._misplaced(q, k, grid)(unit)
    for n in (0, 20, 55):
        there = module.neighborhoods(grid)[0].dense()[n].nonzero()[:, 0]
        here = A2Mamba(dim=16, heads=4, window=3).neighborhoods(grid)[0].dense()[n].nonzero()[:, 0]
        torch.testing.assert_close(moved[:, :, n, here], dilated[:, :, n, there])
        assert moved[:, :, n].sum(-1).allclose(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("side", [8, 16, 32])
def test_pairs_are_linear_in_the_map(side):
    grid = Grid(side, side)
    shape = (1, 2, grid.numel, 4)
    for where in A2Mamba(dim=16, heads=4, window=3).neighborhoods(grid):
        assert explain(shape, shape, shape, where=where).pairs_needed == 2 * grid.numel * 9


def test_published_dilations():
    for side, window, dilation in ((56, 11, 5), (28, 9, 3), (14, 7, 2), (7, 7, 1)):
        far = A2Mamba(dim=16, heads=4, window=window).neighborhoods(Grid(side, side))[1]
        assert far.dilation == (dilation, dilation)


def test_gradients_flow_to_every_parameter_in_both_forms():
    for options in ({}, {"form": "global", "grid": Grid(5, 6)}):
        module = layer(**options)
        module(image(5, 6)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_odd_numbers_of_heads_are_doubled_for_a_workload():
    assert A2Mamba.for_workload(dim=24, grid=Grid(8, 8), heads=3).heads == 6
    assert A2Mamba.for_workload(dim=16, grid=Grid(8, 16), heads=2).window == (3, 7)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"heads": 1}, "heads"),
        ({"heads": 8}, "heads"),
        ({"form": "local"}, "form"),
        ({"form": "global"}, "grid"),
        ({"window": 0}, "window"),
        ({"dilation": 0}, "dilation"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        A2Mamba(**{"dim": 16, "heads": 4, **options})
