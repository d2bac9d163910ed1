import torch
from torch import nn

from foveate.core.grid import Grid
from foveate.measure.exactness import error_against_full, smooth_tokens
from tests.measure.toys import ToyAttention, gate_toy, toy


def test_the_same_mechanism_has_no_error_and_a_narrow_one_has():
    grid = Grid(20)
    assert error_against_full(toy(grid=grid, radius=20), toy(grid=grid)) < 1e-6
    narrow = error_against_full(toy(grid=grid, radius=1), toy(grid=grid))
    wide = error_against_full(toy(grid=grid, radius=8), toy(grid=grid))
    assert narrow > wide > 1e-3


def test_own_parameters_or_layout_have_no_figure():
    class Renamed(ToyAttention):
        def __init__(self, dim):
            super().__init__(dim)
            self.extra, self.qkv = self.qkv, nn.Linear(dim, 3 * dim, bias=False)

    assert error_against_full(toy(Renamed), toy()) is None
    assert error_against_full(gate_toy(), toy()) is None


def test_neighbours_resemble_each_other():
    x = smooth_tokens(Grid(32, 32), 16).reshape(32, 32, 16)
    near = (x[1:] - x[:-1]).square().mean()
    far = (x[16:] - x[:-16]).square().mean()
    assert torch.isfinite(x).all()
    assert near < 0.7 * far


def test_what_a_mechanism_adds_is_set_to_zero_and_likeness_decides():
    class Added(ToyAttention):
        def __init__(self, dim, **options):
            super().__init__(dim, **options)
            self.shift = nn.Parameter(torch.full((dim,), 7.0))

        def forward(self, x, grid):
            return super().forward(x, grid) + self.shift

    full = toy(grid=Grid(20))
    assert error_against_full(toy(Added, grid=Grid(20)), full) < 1e-6
    query, key, _ = full.module.qkv.weight.chunk(3)
    assert torch.equal(query, key)
