"""Every form of `sample` equals its definition, and torch's grid_sample where that exists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import grid_sample

from foveate.core.grid import Grid
from foveate.kernels.sample import bag, sample
from tests.kernels.sample.cases import cases, in_loops, make

EVERY = ("bag", "grid_sample", "reference")


def can(case, backend):
    return backend != "grid_sample" or (case.factor is None and case.levels[0].ndim > 4)


@given(case=cases())
def test_every_backend_equals_the_definition(case):
    expected = in_loops(case)
    for backend in ("auto", *EVERY):
        if can(case, backend):
            out = case.run(backend)
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@given(case=cases())
def test_every_backend_has_the_gradients_of_the_reference(case):
    def gradients(backend):
        return torch.autograd.grad(case.run(backend).sin().sum(), case.leaves, materialize_grads=True)

    expected = gradients("reference")
    for backend in EVERY:
        if can(case, backend):
            for ours, truth in zip(gradients(backend), expected, strict=True):
                torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8)


@given(case=cases(), piece=st.sampled_from([1, 8, 32]))
def test_pieces_give_the_same(case, piece):
    expected = case.run("bag")
    expected = (expected, *torch.autograd.grad(expected.sin().sum(), case.leaves))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bag, "PIECE", piece)
        out = case.run("bag")
        with torch.no_grad():
            torch.testing.assert_close(case.run("bag"), out)
        gradients = torch.autograd.grad(out.sin().sum(), case.leaves)
    for ours, truth in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighted": False},
        {"sizes": ((7,), (1,))},
        {"sizes": ((2, 3, 4),)},
        {"bins": (3, 2)},
        {"bins": (3, 2), "per_head": True, "weighted": False},
        {"sizes": ((4,),), "bins": (3,), "coords": "corners"},
        {"sizes": ((2, 3, 2),), "bins": (2,), "coords": "pixels"},
    ],
    ids=str,
)
def test_gradcheck(options):
    case = make(b=1, q=2, p=2, **options)
    levels, bins = len(case.levels), len(case.factor or ())
    for backend in EVERY:
        if not can(case, backend):
            continue

        def call(*leaves, backend=backend):
            weights = leaves[levels + 1] if case.weights is not None else None
            factor = leaves[-bins:] if bins else None
            return sample(
                leaves[:levels], leaves[levels], weights, factor=factor, coords=case.coords, backend=backend
            )

        assert torch.autograd.gradcheck(call, case.leaves, fast_mode=True)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(call, case.leaves, fast_mode=True)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize(("coords", "aligned"), [("centers", False), ("corners", True)])
def test_equals_grid_sample(backend, size, coords, aligned):
    case = make(b=2, m=3, c=4, q=6, p=2, sizes=(size,), weighted=False, coords=coords)
    (level,), points = case.levels, case.points
    at = (2 * points[:, :, :, 0] - 1).flatten(0, 1)
    at = at.unsqueeze(1) if len(size) == 3 else at
    theirs = grid_sample(level.flatten(0, 1), at, align_corners=aligned)
    theirs = theirs.reshape(2, 3, 4, 6, 2).permute(0, 1, 3, 4, 2).unsqueeze(3)
    ours = case.run(backend)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, [level, points], cotangent),
        torch.autograd.grad(theirs, [level, points], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["bag", "reference"])
def test_a_factor_equals_the_volume_it_stands_for(backend):
    case = make(sizes=((4, 5), (3, 3)), bins=(6, 2))
    volumes = [x.unsqueeze(3) * f[:, None, None] for x, f in zip(case.levels, case.factor, strict=True)]
    expected = sample(volumes, case.points, case.weights, backend="grid_sample")
    torch.testing.assert_close(case.run(backend), expected)


@pytest.mark.parametrize("backend", ["bag", "reference"])
@pytest.mark.parametrize("size", [(6,), (3, 5), (2, 3, 4)])
def test_pixels_are_read_as_they_are(backend, size):
    level = torch.randn(1, 1, 2, *size, dtype=torch.float64)
    points = Grid(*size).coords().flip(-1).double()[None, None, :, None, None]
    out = sample([level], points, coords="pixels", backend=backend)
    assert torch.equal(out.flatten(3).flatten(0, 2), level.flatten(3)[0, 0].T)


@pytest.mark.parametrize("backend", ["bag", "grid_sample", "reference"])
def test_a_point_counts_from_one_pixel_outside_on(backend):
    level = torch.ones(1, 1, 1, 4, 6, dtype=torch.float64)
    x = torch.tensor([-1.0, -0.75, 0.0, 5.0, 5.75, 6.0, 1e30, -1e30], dtype=torch.float64)
    points = torch.stack([x, torch.full_like(x, 2)], -1)[None, None, :, None, None].requires_grad_()
    out = sample([level], points, coords="pixels", backend=backend)
    expected = torch.tensor([0, 0.25, 1, 1, 0.25, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(out.flatten(), expected)
    (slope,) = torch.autograd.grad(out.sum(), points)
    assert not slope[0, 0, -2:].any()
    assert slope[0, 0, 1, 0, 0, 0] == pytest.approx(1)


@pytest.mark.parametrize("backend", ["bag", "reference"])
def test_depth_counts_from_one_bin_outside_on(backend):
    level = torch.ones(1, 1, 1, 3, 3, dtype=torch.float64)
    factor = torch.ones(1, 5, 3, 3, dtype=torch.float64)
    z = torch.tensor([-1.5, -1, -0.25, 2.5, 4.75, 5], dtype=torch.float64)
    points = torch.stack([torch.ones_like(z), torch.ones_like(z), z], -1)[None, None, :, None, None]
    out = sample([level], points, factor=[factor], coords="pixels", backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0, 0, 0.75, 1, 0.25, 0], dtype=torch.float64))


def test_weights_are_not_normalised():
    case = make()
    half = sample(case.levels, case.points, case.weights / 2)
    torch.testing.assert_close(half * 2, case.run())
    values = sample(case.levels, case.points)
    assert values.shape == (2, 2, 4, 2, 3, 3)
    torch.testing.assert_close((values * case.weights[..., None]).sum((3, 4)), case.run())


def test_heads_and_samples_do_not_mix():
    case = make(bins=(3, 2), per_head=True)
    for row, head in ((0, 1), (1, 0)):
        one = (slice(row, row + 1), slice(head, head + 1))
        alone = sample(
            [x[one] for x in case.levels],
            case.points[one],
            case.weights[one],
            factor=[f[one] for f in case.factor],
        )
        torch.testing.assert_close(alone, case.run()[one])


def test_not_a_number_is_handed_on():
    case = make(sizes=((4, 4),))
    points = case.points.detach().clone()
    points[0, 0, 0, 0, 0, 0] = torch.nan
    out = sample(case.levels, points, case.weights)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 0, 1:].isfinite().all()
