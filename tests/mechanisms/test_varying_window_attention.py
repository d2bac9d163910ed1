"""Varying window attention: every 'works when' statement of its description, as a test."""

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.local.varying_window_attention import (
    VaryingWindowAttention,
    VaryingWindowBranch,
    to_map,
)
from foveate.mechanisms.projections import merge_heads, split_heads

DIM = 32


def ready(module):
    """In double precision and eval mode, parameters and statistics drawn at random."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.3)
    return module.double().eval()


def branch(ratio, windows=4, **options):
    return ready(
        VaryingWindowBranch(**{"dim": DIM, "heads": 2, "ratio": ratio, "windows": windows, **options})
    )


def tokens(grid, batch=2, dim=DIM):
    return torch.randn(batch, grid.numel, dim, dtype=torch.float64)


def copied_and_unfolded(e, ratio, counts):
    """The authors' steps on the embedded map (B, c, H, W): copy, unfold, stack blocks into channels."""
    size = [n // count for n, count in zip(e.shape[2:], counts, strict=True)]
    for axis, p in ((3, size[1]), (2, size[0])):
        n, cut = e.shape[axis], (ratio + 1) * p // 2
        left, right = e.narrow(axis, cut, ratio * p - cut), e.narrow(axis, n - ratio * p, ratio * p - cut)
        e = torch.cat([left, e, right], dim=axis)
    wide = [ratio * p for p in size]
    boxes = functional.unfold(e, wide, stride=size)[..., : counts[0] * counts[1]]
    boxes = boxes.reshape(len(e), -1, size[0], ratio, size[1], ratio, *counts)
    # (b, c, row, within, column, within, window row, window column) -> tokens, (within, within, c)
    return boxes.permute(0, 6, 2, 7, 4, 3, 5, 1).flatten(5).flatten(1, 4)


@pytest.mark.parametrize(
    ("ratio", "windows", "sizes"),
    [
        (2, 4, (8, 12)),
        (4, 4, (8, 8)),
        (2, 4, (12, 20)),
        (4, 4, (20, 12)),
        (3, 4, (12, 16)),
        (2, (2, 4), (8, 12)),
    ],
)
def test_against_copying_and_unfolding(ratio, windows, sizes):
    dim = 36 if ratio == 3 else DIM
    ours, grid = branch(ratio, windows, dim=dim), Grid(*sizes)
    x, counts = tokens(grid, dim=dim), grid.per_axis(windows, "windows")
    z = copied_and_unfolded(ours.embed(to_map(x, grid)), ratio, counts)
    torch.testing.assert_close(ours.keys(x, grid), z)
    place = grid.coords() // (torch.tensor(sizes) // torch.tensor(counts))
    inside = (place[:, None] == place[None]).all(-1)
    k, v = (split_heads(part, 2) for part in ours.kv(z).chunk(2, -1))
    dense = ours.proj(merge_heads(attend(split_heads(ours.q(x), 2), k, v, mask=inside, backend="reference")))
    torch.testing.assert_close(ours(x, grid), ours.norm(dense.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("windows", [1, 4])
def test_ratio_one_is_window_attention_and_one_window_is_dense(windows):
    ours, grid = branch(1, windows), Grid(8, 12)
    assert torch.equal(ours.contexts(grid), torch.arange(96)[:, None])
    assert ours.where(grid).size == (8 // windows, 12 // windows)
    x = tokens(grid)
    z = ours.embed(to_map(x, grid)).flatten(2).transpose(1, 2)
    k, v = (split_heads(part, 2) for part in ours.kv(z).chunk(2, -1))
    out = attend(split_heads(ours.q(x), 2), k, v, mask=ours.where(grid).dense(), backend="reference")
    torch.testing.assert_close(ours(x, grid), ours.norm(ours.proj(merge_heads(out)).mT).mT)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_a_window_looks_at_the_tokens_of_the_context_moved_inside(ratio, side):
    grid = Grid(8 * side, 8 * (side + 1))
    ours = VaryingWindowBranch(dim=64, heads=2, ratio=ratio)
    seen, coords, size = ours.contexts(grid), grid.coords(), torch.tensor([side, side + 1])
    assert seen.min() >= 0, "no zeros enter"
    window = coords // size
    for row, column in [(0, 0), (0, 7), (1, 3), (4, 4), (6, 1), (7, 7)]:
        mine = seen[(window == torch.tensor([row, column])).all(-1)].flatten()
        assert mine.unique().numel() == mine.numel() == ratio**2 * side * (side + 1)
        for axis, (place, p) in enumerate(zip((row, column), (side, side + 1), strict=True)):
            first = place * p - (ratio * p - (ratio + 1) * p // 2)
            first = min(max(first, 0), grid[axis] - ratio * p)
            assert coords[mine][:, axis].unique().tolist() == list(range(first, first + ratio * p))


def test_eight_windows_with_ratio_eight_all_see_the_map():
    grid = Grid(16, 16)
    ours = VaryingWindowBranch(dim=64, heads=2, ratio=8)
    windows = ours.where(grid).dense().unique(dim=0)
    assert len(windows) == 64
    assert all(ours.contexts(grid)[rows].unique().numel() == 256 for rows in windows)


def test_gradients_reach_the_context_and_the_rim_of_the_convolution():
    ours, grid = branch(2), Grid(16, 16)
    x = tokens(grid, 1).requires_grad_()
    out = ours(x, grid)[0].unflatten(0, (16, 16))
    # The window in rows and columns 4 to 7 looks at 2 to 9; the 2 x 2 convolution adds one behind.
    (grad,) = torch.autograd.grad(out[5, 6].sum(), x)
    reached = (grad[0].abs().amax(-1) > 0).unflatten(0, (16, 16))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:11, 2:11] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_every_ratio_costs_as_much_as_window_attention(side):
    grid, n = Grid(side, side), side * side
    shape = (1, 2, n, 16)
    pairs = [explain(shape, shape, shape, where=branch(r).where(grid)).pairs_needed for r in (1, 2, 4)]
    assert pairs == [2 * n * (side // 4) ** 2] * 3


def test_the_shortcut_adds_the_input():
    grid = Grid(8, 8)
    plain, short = branch(2), branch(2, shortcut=True)
    short.load_state_dict(plain.state_dict())
    x = tokens(grid)
    torch.testing.assert_close(short(x, grid), x + plain(x, grid))


def test_reduction_narrows_queries_and_keys():
    ours = branch(2, reduction=2)
    assert (ours.q.out_features, ours.kv.out_features) == (16, 32)
    assert ours(tokens(Grid(8, 8)), Grid(8, 8)).shape == (2, 64, DIM)


def test_the_module_fuses_local_pooled_and_window_paths():
    ours = ready(VaryingWindowAttention(dim=DIM, heads=2, ratios=(2, 4), windows=4, shortcut=True))
    grid = Grid(8, 12)
    x = tokens(grid)
    image = to_map(x, grid)
    pooled = ours.pool[1](image.mean((2, 3), keepdim=True)).expand_as(image)
    paths = [ours.local(image), pooled, *(to_map(b(x, grid), grid) for b in ours.branches)]
    torch.testing.assert_close(to_map(ours(x, grid), grid), ours.fuse(torch.cat(paths, 1)))
    assert ours.fuse[0].in_channels == 4 * DIM


def test_batch_norm_needs_two_samples_in_training():
    ours = VaryingWindowAttention(dim=DIM, heads=2, ratios=(2,), windows=4)
    with pytest.raises(ArgumentError, match=r"^x: .*two samples"):
        ours.train()(torch.randn(1, 64, DIM), Grid(8, 8))
    assert ours.train()(torch.randn(2, 64, DIM), Grid(8, 8)).isfinite().all()


def test_windows_and_ratios_for_workloads():
    def chosen(dim, *sizes):
        made = VaryingWindowAttention.for_workload(dim=dim, grid=Grid(*sizes), heads=2)
        return made.windows, made.ratios

    assert chosen(64, 64, 64) == (8, (2, 4, 8))
    assert chosen(48, 48, 48) == (8, (2, 4))
    assert chosen(64, 16, 16) == (4, (2, 4))
    assert chosen(16, 4, 6) == (2, (2,))
    with pytest.raises(ArgumentError, match=r"^grid"):
        chosen(64, 13, 14)
    with pytest.raises(ArgumentError, match=r"^dim: .*multiple of 4"):
        chosen(6, 16, 16)
    with pytest.raises(ArgumentError, match=r"causal.*Not causal"):
        VaryingWindowAttention.for_workload(dim=16, grid=Grid(8, 8), heads=2, causal=True)


def test_backends_agree_in_half_precision():
    torch.manual_seed(0)
    ours, grid = branch(2).bfloat16(), Grid(12, 20)
    x = tokens(grid).bfloat16()
    fast = ours(x, grid)
    ours.backend = "reference"
    torch.testing.assert_close(fast, ours(x, grid), rtol=5e-2, atol=0.1)


def test_bad_options_are_named():
    for options, message in (
        ({"ratio": 0}, r"^ratio"),
        ({"ratio": 5}, r"^ratio: .*windows=4"),
        ({"windows": 0}, r"^windows"),
        ({"dim": 30}, r"^dim: .*ratio\^2=4"),
        ({"reduction": 3}, r"^reduction"),
        ({"reduction": 32}, r"^dim: .*heads=2"),
    ):
        with pytest.raises(ArgumentError, match=message):
            VaryingWindowBranch(**{"dim": DIM, "heads": 2, "ratio": 2, "windows": 4, **options})
    with pytest.raises(ArgumentError, match=r"^ratios"):
        VaryingWindowAttention(dim=DIM, heads=2, ratios=())
    with pytest.raises(ArgumentError, match=r"^grid: .*windows=4"):
        branch(2)(tokens(Grid(8, 10)), Grid(8, 10))
