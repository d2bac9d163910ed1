"""Precision, memory, and the transforms of torch: autocast, compile."""

import pytest
import torch
from torch.nn.functional import grid_sample

from foveate.kernels.sample import bag, sample
from foveate.measure.memory import peak_bytes
from tests.kernels.sample.cases import make

HALVES = (torch.bfloat16, torch.float16)


def worst(a, b):
    return (a.double() - b).abs().max().item()


@pytest.mark.parametrize("backend", ["bag", "grid_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_error_budget(backend, dtype):
    case = make(c=8, q=50, p=4, sizes=((17, 19), (8, 9))).to(dtype)
    truth = case.to(torch.float64)
    results = {}
    for name, this, run in (
        ("truth", truth, lambda c: c.run("reference")),
        ("plain", case, plainly),
        ("ours", case, lambda c: c.run(backend)),
    ):
        out = run(this)
        results[name] = (out, *torch.autograd.grad(out.double().sin().sum(), this.leaves))
    factors = (2, *[3] * len(case.leaves))
    for factor, ours, plain, exact in zip(
        factors, results["ours"], results["plain"], results["truth"], strict=True
    ):
        assert ours.dtype == dtype
        assert worst(ours, exact) <= factor * worst(plain, exact)


def plainly(case):
    """The bilinear sum written in the dtype of the case; positions in float32, else pixels would be missed."""
    total = 0
    for index, level in enumerate(case.levels):
        h, w = level.shape[3:]
        at = case.points[:, :, :, index].float() * torch.tensor([w, h]) - 0.5
        low = at.detach().floor()
        part = (at - low).to(level.dtype)
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = low[..., 0].long() + dx, low[..., 1].long() + dy
            share = (part[..., 0] if dx else 1 - part[..., 0]) * (part[..., 1] if dy else 1 - part[..., 1])
            share = share * ((x >= 0) & (x < w) & (y >= 0) & (y < h))
            ids = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
            rows = level.flatten(3).transpose(2, 3)
            read = rows.gather(2, ids.flatten(2)[..., None].expand(-1, -1, -1, rows.shape[3]))
            read = read.unflatten(2, ids.shape[2:])
            total = total + (read * (share * case.weights[:, :, :, index])[..., None]).sum(3)
    return total


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_maps_are_added_up_in_float32(dtype):
    level = torch.ones(1, 1, 1, 4, 4, dtype=dtype)
    points = torch.full((1, 1, 1, 1, 4096, 2), 0.5)
    weights = torch.full((1, 1, 1, 1, 4096), 1 / 4096)
    out = sample([level], points, weights)
    assert out.dtype == dtype
    assert out.item() == 1


def test_points_keep_more_precision_than_the_maps():
    level = torch.linspace(0, 1, 513).view(1, 1, 1, 1, 513)
    points = torch.tensor([0.70093, 0.5]).view(1, 1, 1, 1, 1, 2)
    exact = sample([level], points)
    assert sample([level.bfloat16()], points).float().item() == pytest.approx(exact.item(), rel=5e-3)
    assert sample([level.bfloat16()], points.double()).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["bag", "grid_sample", "reference"])
def test_autocast_changes_nothing(backend):
    case = make().to(torch.float32)
    expected = case.run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(backend), expected)


@pytest.mark.parametrize(
    ("options", "piece"),
    [({}, 2**18), ({"bins": (3, 2)}, 2**18), ({"weighted": False, "sizes": ((5,),)}, 2**18), ({"b": 1}, 200)],
    ids=str,
)
def test_compiles_as_one_graph(options, piece, monkeypatch):
    monkeypatch.setattr(bag, "PIECE", piece)
    case = make(**options).to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given, factor: sample(*given, factor=factor), fullgraph=True, backend="aot_eager"
    )
    expected = case.run()
    out = compiled(case.levels, case.points, case.weights, factor=case.factor)
    torch.testing.assert_close(out, expected)
    for ours, truth in zip(
        torch.autograd.grad(out.sin().sum(), case.leaves),
        torch.autograd.grad(expected.sin().sum(), case.leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)


def stored(run):
    """Bytes kept for the backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        run()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_what_is_kept_grows_with_points_not_with_points_times_channels():
    wide, narrow = (make(b=1, m=1, c=c, q=256, p=8, sizes=((6, 6),)).to(torch.float32) for c in (128, 8))
    maps = 120 * 36 * 4
    assert stored(wide.run) - stored(narrow.run) <= 2 * maps

    def by_torch():
        at = 2 * wide.points[:, 0, :, 0] - 1
        values = grid_sample(wide.levels[0][:, 0], at, align_corners=False)
        return (values * wide.weights[:, :, :, 0]).sum(-1)

    assert stored(wide.run) < stored(by_torch) / 2


def test_no_volume_is_stored_for_a_factor():
    case = make(b=1, m=1, c=64, q=8, p=4, sizes=((8, 8),), bins=(100,)).to(torch.float32)
    volume = 64 * 100 * 64 * 4
    assert stored(case.run) < volume / 8
    assert stored(lambda: case.run("reference")) > volume


def test_pieces_bound_the_memory(monkeypatch):
    case = make(b=1, m=4, c=4, q=512, p=8, sizes=((6, 6),)).to(torch.float32)

    def peak():
        return peak_bytes(lambda: torch.autograd.grad(case.run("bag").sum(), case.leaves))

    whole = peak()
    monkeypatch.setattr(bag, "PIECE", 2**12)
    assert peak() < whole / 3
