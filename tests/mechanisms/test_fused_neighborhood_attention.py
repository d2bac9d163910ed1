"""FNA: every 'works when' statement of its description, as a test."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.local.fused_neighborhood_attention import (
    NeighborhoodAttention,
    neighborhood_attention,
)
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Neighborhood


def qkv(n, heads=2, d=4, kv_heads=None, batch=1):
    make = torch.Generator().manual_seed(3)
    shape = {"generator": make, "dtype": torch.float64}
    return (
        torch.randn(batch, heads, n, d, **shape),
        torch.randn(batch, kv_heads or heads, n, d, **shape),
        torch.randn(batch, kv_heads or heads, n, d, **shape),
    )


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (2, 3, 4)])
def test_window_as_large_as_the_grid_is_full_attention(sizes):
    grid = Grid(*sizes)
    q, k, v = qkv(grid.numel)
    out = neighborhood_attention(q, k, v, Neighborhood(grid, sizes))
    torch.testing.assert_close(out, attend(q, k, v))


def test_causal_window_as_long_as_the_sequence_is_causal_attention():
    q, k, v = qkv(11)
    out = neighborhood_attention(q, k, v, Neighborhood(Grid(11), 11, causal=True))
    torch.testing.assert_close(out, attend(q, k, v, where=Causal()))


@st.composite
def neighborhoods(draw, causal=False, rank=None):
    rank = rank or draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 24 if rank == 1 else 8 if rank == 2 else 5)) for _ in range(rank)]
    windows = [draw(st.integers(1, n)) for n in sizes]
    dilations = [draw(st.integers(1, n // w)) for n, w in zip(sizes, windows, strict=True)]
    causals = [causal and draw(st.booleans()) for _ in sizes]
    return Neighborhood(Grid(*sizes), windows, dilation=dilations, causal=causals)


@given(neighborhoods())
def test_every_row_has_exactly_the_keys_of_a_window(where):
    keys = torch.tensor(where.window).prod()
    assert (where.dense().sum(1) == keys).all()


@given(neighborhoods(rank=1))
def test_rows_are_clamped_to_the_nearest_interior_row(where):
    (n,), (w,), (d,) = where.grid.sizes, where.window, where.dilation
    mask = where.dense()
    for i in range(n):
        group, length = i % d, -(-(n - i % d) // d)
        nearest = min(max(i // d, w // 2), length - w + w // 2) * d + group
        assert torch.equal(mask[i], mask[nearest])
        start = (nearest // d - w // 2) * d + group
        assert mask[i].nonzero().flatten().tolist() == list(range(start, start + w * d, d))


def test_interior_is_translation_equivariant():
    mask = Neighborhood(Grid(12, 13), (3, 4)).dense().reshape(12, 13, 12, 13)
    assert torch.equal(mask[5, 6].roll((1, 2), (0, 1)), mask[6, 8])


@pytest.mark.parametrize(("n", "dilation"), [(12, 3), (13, 3), (14, 4)])
def test_dilation_is_attention_on_each_sub_grid(n, dilation):
    grid = Grid(n, n + 1)
    q, k, v = qkv(grid.numel)
    out = neighborhood_attention(q, k, v, Neighborhood(grid, 3, dilation=dilation))
    ids = torch.arange(grid.numel).reshape(grid.sizes)
    for a in range(dilation):
        for b in range(dilation):
            own = ids[a::dilation, b::dilation]
            flat = own.flatten()
            part = neighborhood_attention(
                q[:, :, flat], k[:, :, flat], v[:, :, flat], Neighborhood(Grid(*own.shape), 3)
            )
            torch.testing.assert_close(out[:, :, flat], part)


@given(neighborhoods(causal=True))
def test_mask_is_the_kronecker_product_of_its_axes(where):
    product = torch.ones(1, 1)
    for n, w, d, c in zip(where.grid, where.window, where.dilation, where.causal, strict=True):
        product = torch.kron(product, Neighborhood(Grid(n), w, dilation=d, causal=c).dense().float())
    assert torch.equal(product.bool(), where.dense())


def test_additional_keys_join_one_softmax():
    grid = Grid(5, 6)
    q, k, v = qkv(30, heads=4, kv_heads=2)
    ak, av = torch.randn(2, 1, 2, 7, 4, dtype=torch.float64)
    where = Neighborhood(grid, 3)
    out, lse = neighborhood_attention(
        q, k, v, where, additional_keys=ak, additional_values=av, return_lse=True
    )
    mask = torch.cat([where.dense(), torch.ones(30, 7, dtype=torch.bool)], dim=1)
    whole, whole_lse = attend(
        q, torch.cat([k, ak], dim=2), torch.cat([v, av], dim=2), mask=mask, return_lse=True
    )
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_additional_keys_need_values():
    q, k, v = qkv(9)
    with pytest.raises(ArgumentError, match="additional_values"):
        neighborhood_attention(q, k, v, Neighborhood(Grid(9), 3), additional_keys=k)


def test_even_windows_look_one_further_back():
    assert Neighborhood(Grid(9), 4).dense()[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "grid", "name"),
    [
        ({"window": 7}, Grid(5, 9), "window"),
        ({"window": 3, "dilation": 4}, Grid(9, 12), "dilation"),
        ({"window": (3, 3)}, Grid(9), "window"),
        ({"window": 0}, Grid(9), "window"),
    ],
)
def test_options_that_do_not_fit_the_grid_are_named(options, grid, name):
    module = NeighborhoodAttention(dim=8, heads=2, **options)
    with pytest.raises(ArgumentError, match=name):
        module(torch.randn(1, grid.numel, 8), grid)


def test_parameters():
    module = NeighborhoodAttention(dim=8, heads=2, window=3)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
