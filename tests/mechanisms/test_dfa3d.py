"""DFA3D: every 'works when' statement of its description, as a test."""

import math

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError
from foveate.kernels.sample import sample
from foveate.kernels.sample.contract import corners
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.routed.dfa3d import DepthDeformableAttention, corner_depths

SIZES = ((5, 7), (3, 4))
BINS = 6


def problem(*, per_head=False, dim=8, heads=2, q=5, p=3, seed=0):
    """Maps, distributions, points and weights of the operator."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    maps = [randn(2, heads, dim // heads, *s).requires_grad_() for s in SIZES]
    inner = (heads, BINS) if per_head else (BINS,)
    depth = [randn(2, *inner, *s).softmax(-3).requires_grad_() for s in SIZES]
    points = torch.rand((2, heads, q, len(SIZES), p, 3), generator=g, dtype=torch.float64) * 1.4 - 0.2
    weights = randn(2, heads, q, len(SIZES) * p).softmax(-1).unflatten(-1, (len(SIZES), p))
    return maps, depth, points.requires_grad_(), weights


def layer(**options):
    made = DepthDeformableAttention(
        **({"dim": 8, "heads": 2, "levels": 2, "points": 4, "anchors": 2} | options)
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made.double()


def sources(module, q=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, q, module.dim, generator=g).double()
    return x, *module.example(x)


def inside(points, size):
    """Whether the depth of a point lies between the first and the last bin."""
    z = points[..., 2] * size - 0.5
    return (z >= 0) & (z <= size - 1)


def test_uniform_depth_is_two_dimensional_deformable_attention_over_the_bins():
    maps, _, points, weights = problem()
    depth = [torch.full((2, BINS, *s), 1 / BINS, dtype=torch.float64) for s in SIZES]
    with torch.no_grad():
        points[..., 2] = points[..., 2].clamp(0.5 / BINS, 1 - 0.5 / BINS)
    assert inside(points, BINS).all()
    flat = sample(maps, points[..., :2], weights)
    torch.testing.assert_close(sample(maps, points, weights, factor=depth), flat / BINS)


def test_certain_depth_at_the_bin_asked_for_is_two_dimensional_deformable_attention():
    maps, _, points, weights = problem()
    depth = [torch.zeros(2, BINS, *s, dtype=torch.float64) for s in SIZES]
    for d in depth:
        d[:, 3] = 1
    at, other = points.detach().clone(), points.detach().clone()
    at[..., 2], other[..., 2] = 3.5 / BINS, 4.5 / BINS
    torch.testing.assert_close(sample(maps, at, weights, factor=depth), sample(maps, at[..., :2], weights))
    assert sample(maps, other, weights, factor=depth).abs().max() < 1e-12


@pytest.mark.parametrize("per_head", [False, True])
def test_one_stage_equals_two(per_head):
    """First the depths at the four pixels of a point, then bilinear sums of features weighted by them."""
    maps, depth, points, weights = problem(per_head=per_head)
    scores = corner_depths(depth, points)
    total = 0
    for index, (level, size) in enumerate(zip(maps, SIZES, strict=True)):
        at = points[:, :, :, index, :, :2] * torch.tensor(size[::-1]) - 0.5
        ids, bilinear = corners(at, size[::-1])
        share = bilinear * scores[:, :, :, index] * weights[:, :, :, index, :, None]
        rows = level.flatten(3).gather(3, ids.flatten(2).unsqueeze(2).expand(-1, -1, level.shape[2], -1))
        total = total + (rows.unflatten(3, ids.shape[2:]) * share.unsqueeze(2)).sum((-1, -2)).transpose(2, 3)
    torch.testing.assert_close(sample(maps, points, weights, factor=depth), total)


def test_x_and_y_have_the_gradient_of_the_explicit_volume():
    maps, depth, points, weights = problem()
    volumes = [m.unsqueeze(3) * d[:, None, None] for m, d in zip(maps, depth, strict=True)]
    leaves = [points, *maps, *depth]
    ours = torch.autograd.grad(sample(maps, points, weights, factor=depth).sin().sum(), leaves)
    theirs = torch.autograd.grad(sample(volumes, points, weights, backend="grid_sample").sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert (ours[0].abs().amax((0, 1, 2, 3, 4)) > 1e-3).all()


def test_the_depth_of_a_point_is_read_at_its_four_pixels():
    depth = torch.rand(1, 4, 3, 3, dtype=torch.float64)
    # Between pixels (1, 0), (2, 0), (1, 1), (2, 1) as (x, y), a quarter of the way from bin 1 to bin 2.
    point = torch.tensor([(1.6 + 0.5) / 3, (0.2 + 0.5) / 3, (1.25 + 0.5) / 4], dtype=torch.float64)
    found = corner_depths([depth], point.view(1, 1, 1, 1, 1, 3)).flatten()
    between = 0.75 * depth[0, 1] + 0.25 * depth[0, 2]
    torch.testing.assert_close(
        found, torch.stack([between[0, 1], between[0, 2], between[1, 1], between[1, 2]])
    )
    outside = torch.tensor([-0.1, 0.5, 0.5], dtype=torch.float64)  # x = -0.8: half of the corners are out
    found = corner_depths([depth], outside.view(1, 1, 1, 1, 1, 3)).flatten()
    assert not found[::2].any()
    assert found[1::2].all()


def test_the_layer_is_its_equation():
    module = layer()
    x, reference, maps, depth = sources(module)
    out, trust = module(x, reference, maps, depth, return_confidence=True)
    weights = split_heads(module.weights(x), 2).softmax(-1).unflatten(-1, (2, 4))
    values, points = [], torch.zeros(2, 2, 5, 2, 4, 3, dtype=torch.float64)
    for m in maps:
        v = nn.functional.conv2d(m, module.value.weight[..., None, None], module.value.bias)
        values.append(v.unflatten(1, (2, 4)))
    xy = module.offsets(x).view(2, 5, 2, 2, 4, 2)
    z = module.depth_offsets(x).view(2, 5, 2, 2, 4)
    for index, d in enumerate(depth):
        for p in range(4):
            start = reference[:, :, p % 2, None]
            points[:, :, :, index, p, 0] = (start[..., 0] + xy[:, :, :, index, p, 0] / d.shape[3]).transpose(
                1, 2
            )
            points[:, :, :, index, p, 1] = (start[..., 1] + xy[:, :, :, index, p, 1] / d.shape[2]).transpose(
                1, 2
            )
            points[:, :, :, index, p, 2] = (start[..., 2] + z[:, :, :, index, p] / d.shape[1]).transpose(1, 2)
    expected = sample(values, points, weights, factor=depth, backend="reference")
    torch.testing.assert_close(out, merge_heads(expected))
    confidence = (corner_depths(depth, points).mean(-1) * weights).sum((-1, -2)).transpose(1, 2)
    torch.testing.assert_close(trust, confidence)
    assert trust.shape == (2, 5, 2)


def test_confidence_is_one_where_every_depth_is_certain_and_right():
    module = DepthDeformableAttention(dim=8, heads=2, levels=1, points=2, anchors=2).double()
    with torch.no_grad():
        module.offsets.bias.zero_()
        module.depth_offsets.bias.zero_()
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    maps, depth = [torch.randn(1, 8, 6, 6, dtype=torch.float64)], torch.zeros(1, 4, 6, 6, dtype=torch.float64)
    depth[:, 1] = 1
    reference = torch.rand(1, 3, 2, 3, dtype=torch.float64) * 0.6 + 0.2
    reference[..., 2] = 1.5 / 4
    out, trust = module(x, reference, maps, [depth], return_confidence=True)
    torch.testing.assert_close(trust, torch.ones_like(trust))
    reference[..., 2] = 3.5 / 4
    out, trust = module(x, reference, maps, [depth], return_confidence=True)
    assert not out.any()
    assert not trust.any()


def test_points_start_in_one_direction_per_head_farther_and_farther():
    module = DepthDeformableAttention(dim=16, heads=8, levels=3, points=8, anchors=4)
    assert not module.offsets.weight.any()
    assert not module.weights.bias.any()
    xy = module.offsets.bias.view(8, 3, 8, 2)
    z = module.depth_offsets.bias.view(8, 3, 8)
    for head in range(8):
        angle = 2 * math.pi * head / 8
        square = max(abs(math.cos(angle)), abs(math.sin(angle)))
        for p in range(8):
            want = torch.tensor([math.cos(angle), math.sin(angle)]) * (p + 1) / square
            torch.testing.assert_close(xy[head, :, p], want.expand(3, 2), rtol=1e-5, atol=1e-5)
            want = torch.tensor((math.cos(angle) + math.sin(angle)) / 2 * (p + 1))
            torch.testing.assert_close(z[head, :, p], want.expand(3), rtol=1e-5, atol=1e-5)


def test_gradients_reach_offsets_distributions_and_references():
    module = layer()
    x, reference, maps, depth = sources(module)
    given = [x.requires_grad_(), reference.clone().requires_grad_(), maps[1].clone().requires_grad_()]
    depths = [d.clone().requires_grad_() for d in depth]
    out, trust = module(given[0], given[1], [maps[0], given[2]], depths, return_confidence=True)
    for total in (out.square().sum(), trust.square().sum()):
        grads = torch.autograd.grad(
            total, [*given[:2], *depths, module.depth_offsets.weight], retain_graph=True
        )
        assert all(g.abs().max() > 0 for g in grads)
    assert torch.autograd.grad(out.square().sum(), given[2])[0].abs().max() > 0


def test_half_precision_keeps_positions():
    module = layer().float()
    x, *rest = sources(module)
    x, reference = x.float(), rest[0].float()
    maps, depth = ([y.float() for y in found] for found in rest[1:])
    exact = module(x, reference, maps, depth)
    half = module.bfloat16()(
        x.bfloat16(), reference, [m.bfloat16() for m in maps], [d.bfloat16() for d in depth]
    )
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert module.positions(x.bfloat16(), reference, [d.shape[1:] for d in depth]).dtype == torch.float32


def test_no_queries_and_refusals_by_name():
    module = layer()
    x, reference, maps, depth = sources(module)
    assert module(x[:, :0], reference[:, :0], maps, depth).shape == (2, 0, 8)
    for given, message in (
        ((x[..., :4], reference, maps, depth), r"^x: expected \(batch, queries, 8\)"),
        ((x, reference[:, :, :1], maps, depth), r"^reference: expected \(2, 5, 2, 3\)"),
        ((x, reference, maps[:1], depth), r"^maps: expected a list of 2 maps"),
        ((x, reference, maps[0], depth), r"^maps: expected a list of 2 maps"),
        ((x, reference, [m[:, :4] for m in maps], depth), r"^maps\[0\]: expected \(2, 8, height, width\)"),
        ((x, reference, maps, [d[:1] for d in depth]), r"^depth\[0\]: expected \(2, D, height, width\)"),
        ((x, reference, maps, depth[::-1]), r"^factor\[0\]: expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            module(*given)
    with pytest.raises(ArgumentError, match=r"^points: expected a multiple of anchors=4"):
        DepthDeformableAttention(dim=8, heads=2, points=6)
    with pytest.raises(ArgumentError, match=r"^levels: expected a positive"):
        DepthDeformableAttention(dim=8, heads=2, levels=0)
