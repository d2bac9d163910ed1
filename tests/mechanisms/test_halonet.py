"""HaloNet: every 'works when' statement of its description."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.mechanisms.local.halonet import VARIANTS, HaloAttention
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.grids import Halo, Windows


def layer(**options):
    torch.manual_seed(0)
    return HaloAttention(**{"dim": 8, "heads": 2, "block": 4, "halo": 1, **options}).double()


def tokens(grid, dim=8, batch=1):
    return torch.randn(
        batch, grid.numel, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def by_the_book(module, x, grid):
    """The whole map under an explicit mask, phantom keys as rows of zeros, offsets one pair at a time."""
    (h, w), (ry, rx) = grid, module.rel
    b, halo = module.block[0], module.halo[0]
    q, k, v = (split_heads(p(x), module.heads)[0] for p in (module.q, module.k, module.v))
    out = torch.zeros(module.heads, grid.numel, v.shape[-1], dtype=x.dtype)
    window = b + 2 * halo
    for y in range(h):
        for c in range(w):
            own = q[:, y * w + c]
            logits, values = [], []
            for ky in range(y // b * b - halo, y // b * b + b + halo):
                for kx in range(c // b * b - halo, c // b * b + b + halo):
                    inside = 0 <= ky < h and 0 <= kx < w
                    key = k[:, ky * w + kx] if inside else torch.zeros_like(own)
                    values.append(v[:, ky * w + kx] if inside else torch.zeros_like(v[:, 0]))
                    row = ry[ky - y + halo + window - 1] + rx[kx - c + halo + window - 1]
                    logits.append((own * key).sum(-1) * own.shape[-1] ** -0.5 + own @ row)
            weights = torch.stack(logits, -1).softmax(-1)
            out[:, y * w + c] = torch.einsum("hk,khd->hd", weights, torch.stack(values))
    return merge_heads(out[None])


@pytest.mark.parametrize("sizes", [(8, 4), (7, 5)])
def test_is_the_papers_equation_also_where_blocks_do_not_divide(sizes):
    grid = Grid(*sizes)
    module, x = layer(), tokens(grid)
    torch.testing.assert_close(module(x, grid), by_the_book(module, x, grid))


def test_no_halo_is_window_attention():
    grid = Grid(8, 8)
    module, x = layer(halo=0), tokens(grid)
    q, k, v = (split_heads(p(x), 2) for p in (module.q, module.k, module.v))
    want = attend(q, k, v, where=Windows(grid, 4), score=module.position(q, grid))
    torch.testing.assert_close(module(x, grid), merge_heads(want))


def test_one_block_is_full_attention():
    grid = Grid(6, 6)
    module, x = layer(block=6, halo=0), tokens(grid)
    q, k, v = (split_heads(p(x), 2) for p in (module.q, module.k, module.v))
    at = grid.coords()
    offset = at[None] - at[:, None] + 5
    bias = sum((q[:, :, :, None] * table[offset[..., a]]).sum(-1) for a, table in enumerate(module.rel))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(module(x, grid), merge_heads(dense))


def test_blocks_of_one_are_sliding_windows_with_zero_padding():
    grid = Grid(5, 6)
    module, x = layer(block=1, halo=2), tokens(grid)
    torch.testing.assert_close(module(x, grid), by_the_book(module, x, grid))
    distance = (grid.coords()[:, None] - grid.coords()[None]).abs().amax(-1)
    assert torch.equal(module.where(grid).dense(), distance <= 2)
    assert module.where(grid).phantoms() == 30 * 25 - int((distance <= 2).sum())


def test_shifts_by_whole_blocks_and_no_others_move_the_output():
    grid = Grid(24, 24)
    module = layer()
    picture = tokens(grid).reshape(1, 24, 24, 8)
    before = module(picture.flatten(1, 2), grid).reshape(1, 24, 24, 8)
    inner = slice(8, 16)  # away from borders and from what is rolled around
    for shift, same in ((4, True), (2, False)):
        after = module(picture.roll(shift, 1).flatten(1, 2), grid).reshape(1, 24, 24, 8).roll(-shift, 1)
        close = torch.allclose(after[:, inner, inner], before[:, inner, inner], rtol=1e-12, atol=1e-12)
        assert close == same


def test_the_mask_of_the_paper():
    grid, b, h = Grid(12, 8), 4, 3
    i = grid.coords()[:, None] // b * b
    j = grid.coords()[None]
    want = ((i - h <= j) & (j < i + b + h)).all(-1)
    assert torch.equal(Halo(grid, b, h, border="zero").dense(), want)


@pytest.mark.parametrize("official", [False, True])
def test_strided_queries(official):
    grid = Grid(8, 8)
    whole = layer()
    module = layer(stride=2, official=official)
    module.load_state_dict(whole.state_dict())
    x = tokens(grid)
    kept = torch.arange(64).reshape(8, 8)[::2, ::2].flatten()
    assert module.grid_out(grid) == Grid(4, 4)
    # Offsets are those of the map by default; the port's are others.
    assert torch.allclose(module(x, grid), whole(x, grid)[:, kept]) == (not official)


@pytest.mark.parametrize("options", [{"avg_down": True}, {"block": 3}])
def test_downsampling_by_averages(options):
    grid = Grid(6, 6)
    whole, module = layer(**{k: v for k, v in options.items() if k == "block"}), layer(stride=2, **options)
    module.load_state_dict(whole.state_dict())
    x = tokens(grid)
    means = whole(x, grid).reshape(1, 3, 2, 3, 2, 8).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(module(x, grid), means)


def test_scaled_positions_and_widths():
    grid = Grid(8, 8)
    module, x = layer(scale_position=True, dim_out=12, head_dim=4), tokens(grid)
    assert module(x, grid).shape == (1, 64, 12)
    other = layer(dim_out=12, head_dim=4)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        for table in other.rel:
            table.mul_(4**-0.5)
    torch.testing.assert_close(module(x, grid), other(x, grid))


def test_phantoms_have_no_bias_of_the_projection():
    grid = Grid(4, 4)
    module, x = layer(qkv_bias=True, halo=2), tokens(grid)
    with torch.no_grad():
        module.v.bias.fill_(5.0)
        module.v.weight.zero_()
    # All values are 5 or, at phantoms, 0: the output says which weight phantoms have.
    out = module(x, grid)
    assert (out < 5).all()
    assert (out > 0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_every_backend_gives_the_same(stride):
    grid = Grid(9, 14)
    module = layer(stride=stride, halo=2).float()
    x = tokens(grid).float()
    found = []
    for name in ("reference", "tiles", *(() if absent() else ("cpu",))):
        module.backend = name
        module.zero_grad()
        out = module(x, grid)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in module.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-4)


def test_cost_is_linear_in_tokens():
    module = layer(block=8, halo=3)
    counts = []
    for side in (32, 64, 128):
        n = side * side
        e = explain((1, 2, n, 4), (1, 2, n, 4), (1, 2, n, 4), where=module.where(Grid(side, side)))
        counts.append(e.pairs_needed / n)
    assert counts == [2 * 14 * 14] * 3


def test_variants_can_be_built():
    assert len(VARIANTS) == 8
    for block, halo, *_ in VARIANTS.values():
        HaloAttention(dim=8, heads=1, block=block, halo=halo)


def test_wrong_options_are_named():
    for options, name in (({"halo": -1}, "halo"), ({"stride": 0}, "stride"), ({"dim_out": 7}, "dim")):
        with pytest.raises(ArgumentError, match=name):
            layer(**options)
    with pytest.raises(ArgumentError, match="grid"):
        layer()(tokens(Grid(16)), Grid(16))
