"""ViG's gated linear attention: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.scan import scan
from foveate.kernels.scan.cost import scan_cost
from foveate.mechanisms.linear.vision_gla import VisionGLA, VisionGLABlock, both_directions

GRID = Grid(4, 5)


def draw(b=2, h=2, n=20, dk=3, dv=4):
    shapes = [(b, h, n, dk), (b, h, n, dk), (b, h, n, dv)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v, -torch.rand(b, h, n, dk).double(), -torch.rand(b, h, n, dk).double()


def naive(q, k, v, decay):
    """One direction, token by token."""
    state, outs = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]).to(q), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ state).squeeze(2) * q.shape[3] ** -0.5)
    return torch.stack(outs, 2)


def test_both_directions_are_the_mean_of_two_plain_recurrences():
    q, k, v, a, b = draw()
    back = naive(*(x.flip(2) for x in (q, k, v, b))).flip(2)
    torch.testing.assert_close(both_directions(q, k, v, a, b), (naive(q, k, v, a) + back) / 2)


def test_open_gates_give_bidirectional_linear_attention_with_the_own_token_twice():
    q, k, v, a, _ = draw()
    own = (q * k).sum(-1, keepdim=True) * v
    expected = (q @ (k.mT @ v) + own) / 2 / q.shape[3] ** 0.5
    torch.testing.assert_close(both_directions(q, k, v, a * 0, a * 0), expected)


def test_shut_gates_leave_every_token_to_itself():
    q, k, v, a, _ = draw()
    shut = torch.full_like(a, -torch.inf)
    own = (q * k).sum(-1, keepdim=True) * v / q.shape[3] ** 0.5
    torch.testing.assert_close(both_directions(q, k, v, shut, shut), own)


def test_flipping_the_sequence_and_swapping_the_gates_flips_the_output():
    q, k, v, a, b = draw()
    flipped = both_directions(*(x.flip(2) for x in (q, k, v, b, a)))
    torch.testing.assert_close(flipped, both_directions(q, k, v, a, b).flip(2))
    unswapped = both_directions(*(x.flip(2) for x in (q, k, v, a, b)))
    assert not torch.allclose(unswapped, both_directions(q, k, v, a, b).flip(2))


def test_the_layer_turns_with_the_map_when_its_gates_are_swapped():
    module = VisionGLA(dim=8, heads=2).double().eval()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    before = module(x, GRID)
    with torch.no_grad():
        last = module.forget[1]
        for part in (last.weight, last.bias):
            part.copy_(torch.cat(part.chunk(2)[::-1]))
        module.conv.weight.copy_(module.conv.weight.flip(2, 3))
    torch.testing.assert_close(module(x.flip(1), GRID).flip(1), before)


def test_the_local_branch_is_all_there_is_when_its_gate_is_open():
    module = VisionGLA(dim=8, heads=2).double()
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.fill_(-60)  # sigmoid 0
        module.proj.weight.copy_(torch.eye(8))
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    u = torch.nn.functional.silu(module.conv(x.mT.unflatten(2, GRID.sizes))).flatten(2).mT
    local = module.local_norm(u.unflatten(-1, (2, 4))).flatten(2)
    torch.testing.assert_close(module(x, GRID), local)


def test_the_authors_evaluation_halves_twice_and_only_epsilon_shows_it():
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    torch.manual_seed(0)
    module = VisionGLA(dim=8, heads=2).double()
    torch.manual_seed(0)
    official = VisionGLA(dim=8, heads=2, official=True).double()
    assert torch.equal(official.train()(x, GRID), module.train()(x, GRID))
    assert not torch.equal(official.eval()(x, GRID), module.eval()(x, GRID))
    for one in (official, module):
        one.norm.eps = one.local_norm.eps = 0.0
    torch.testing.assert_close(official(x, GRID), module(x, GRID))


def test_floor_and_normalizer_bound_the_decay():
    module = VisionGLA(dim=8, heads=2, normalizer=2.0, floor=-0.1)
    with torch.no_grad():
        module.forget[1].bias.fill_(-50.0)
    for decay in module.log_decays(torch.randn(1, 5, 8)):
        assert bool((decay == -0.1).all())
    module.floor = None
    for decay in module.log_decays(torch.randn(1, 5, 8) * 0):
        torch.testing.assert_close(decay, torch.full_like(decay, -25.0))


def test_gates_of_one_direction_move_only_that_direction():
    q, k, v, a, b = draw(n=9)
    a.requires_grad_()
    out = both_directions(q, k, v, a, b)
    for t in range(9):
        (grad,) = torch.autograd.grad(out[:, :, t].sum(), a, retain_graph=True)
        assert not grad[:, :, t + 1 :].any()


def test_cost_is_linear_in_the_number_of_tokens():
    counts = []
    for n in (1024, 4096, 16384):
        cost = scan_cost(batch=1, heads=6, n=n, dk=32, dv=64, decay="channel")
        counts.append(cost.flops / n)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("options", [{}, {"swiglu": True}, {"layer_scale": 0.5}, {"act": "gelu"}])
def test_the_block_adds_both_branches(options):
    block = VisionGLABlock(mixer=VisionGLA(dim=8, heads=2), **options).double().eval()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    scale = options.get("layer_scale", 1.0)
    y = x + scale * block.mixer(block.norm1(x), GRID)
    z = block.norm2(y)
    if options.get("swiglu"):
        gate, up = block.fc1(z).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        assert hidden.shape[-1] % 256 == 0
    else:
        hidden = block.act(block.fc1(z))
    torch.testing.assert_close(block(x, GRID), y + scale * block.fc2(hidden))


def test_bfloat16_stays_near_and_the_state_is_not_rounded():
    module = VisionGLA(dim=16, heads=2).eval()
    x = torch.randn(2, 20, 16)
    exact = module.double()(x.double(), GRID)
    rough = module.bfloat16()(x.bfloat16(), GRID).double()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    q, k, v, a, _ = (y.bfloat16() for y in draw(n=64))
    _, state = scan(q, k, v, decay=a, return_state=True)
    assert state.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 8, "heads": 3}, "^dim: expected a multiple"),
        ({"dim": 8, "heads": 4, "expand_k": 0.25}, "^expand_k: expected"),
        ({"dim": 8, "heads": 2, "floor": 0.5}, "^floor: expected a log decay"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        VisionGLA(**options)


def test_unknown_activations_are_named():
    with pytest.raises(ArgumentError, match=r"^act: expected"):
        VisionGLABlock(mixer=VisionGLA(dim=8, heads=2), act="relu")
