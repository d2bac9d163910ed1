"""PSA: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.banks import join_banks
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.routed.pyramid_sparse_attention import (
    SHARES,
    PyramidSparseAttention,
    pyramid_attention,
    pyramid_banks,
)
from foveate.patterns.basic import BlockList, Causal
from foveate.routing.levels import level_density

BLOCK = (16, 16)


def draw(n, heads=2, d=8, dtype=torch.float64):
    return torch.randn(2, heads, n, d, dtype=dtype)


def random_levels(n_q, n_k, heads=2):
    choice = torch.tensor([0, 1, 2, 4, 8])
    levels = choice[torch.randint(5, (2, heads, -(-n_q // 16), -(-n_k // 16)))]
    levels[..., 0] = 1
    return levels


@pytest.mark.parametrize("n", [64, 71, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_level_one_everywhere_is_full_attention(n, masked):
    q, k, v = draw(n), draw(n), draw(n)
    levels = torch.ones(2, 2, -(-n // 16), -(-n // 16), dtype=torch.long)
    out = pyramid_attention(q, k, v, levels, blocks=BLOCK, masked=masked)
    torch.testing.assert_close(out, attend(q, k, v, where=Causal() if masked else None))


@pytest.mark.parametrize("n", [64, 71, 70])
def test_constant_blocks_are_exact_at_any_level(n):
    torch.manual_seed(0)
    q = draw(n)
    k, v = (draw(-(-n // 16)).repeat_interleave(16, 2)[:, :, :n] for _ in range(2))
    levels = random_levels(n, n).clamp(min=1)
    out = pyramid_attention(q, k, v, levels, blocks=BLOCK)
    torch.testing.assert_close(out, attend(q, k, v))


def test_a_single_block_is_attention_to_it():
    q, k, v = draw(64), draw(64), draw(64)
    levels = torch.zeros(2, 2, 4, 4, dtype=torch.long)
    levels[..., 2] = 1
    where = BlockList(16, [(a, 2) for a in range(4)])
    torch.testing.assert_close(pyramid_attention(q, k, v, levels, blocks=BLOCK), attend(q, k, v, where=where))
    assert not pyramid_attention(q, k, v, levels * 0, blocks=BLOCK).any()


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("n", "heads"), [(64, 2), (75, 4)])
def test_it_is_one_softmax_over_the_concatenated_pooled_tokens(n, heads, official):
    torch.manual_seed(0)
    q, k, v = draw(n, heads), draw(n), draw(n)
    levels = random_levels(n, n, heads)
    out = pyramid_attention(q, k, v, levels, blocks=BLOCK, official=official)
    for b, h, row in ((0, 0, 0), (1, heads - 1, levels.shape[2] - 1)):
        keys, values, bias = [], [], []
        for column, p in enumerate(levels[b, h, row].tolist()):
            if p == 0:
                continue
            ids = torch.arange(column * 16, column * 16 + 16)
            ids = ids.clamp(max=n - 1) if official and p > 1 else ids[ids < n]
            for group in ids.split(p):
                keys.append(k[b, h * 2 // heads, group].mean(0))
                values.append(v[b, h * 2 // heads, group].mean(0))
                bias.append(float(len(group)))
        logits = q[b, h, row * 16 : row * 16 + 16] @ torch.stack(keys).T * 8**-0.5
        expected = (logits + torch.tensor(bias).double().log()).softmax(-1) @ torch.stack(values)
        torch.testing.assert_close(out[b, h, row * 16 : row * 16 + 16], expected)


def test_masked_keys_are_seen_from_their_last_token_on():
    q, k, v = draw(32), draw(32), draw(32)
    levels = torch.tensor([[4, 0], [4, 4]]).expand(2, 2, 2, 2)
    out = pyramid_attention(q, k, v, levels, blocks=BLOCK, masked=True)
    assert not out[:, :, :3].any()
    assert out[:, :, 3].any()
    for t in (3, 9, 20):
        changed = k.clone()
        changed[:, :, t + 1 :] = 7
        after = pyramid_attention(q, changed, v, levels, blocks=BLOCK, masked=True)
        torch.testing.assert_close(after[:, :, : t + 1], out[:, :, : t + 1])


def layer(**options):
    torch.manual_seed(0)
    return PyramidSparseAttention(**{"dim": 16, "heads": 2, "block": 8, **options}).double()


def test_all_blocks_whole_is_a_plain_layer():
    module, grid = layer(shares={1: 1.0}), Grid(5, 9)
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid), module.proj(merge_heads(attend(*module.qkv(x)))))


@pytest.mark.parametrize("mode", ["rank", "mass"])
def test_the_best_blocks_are_seen_best(mode):
    module = layer(mode=mode, shares={1: 0.25, 2: 0.5, 8: 0.75})
    q = torch.zeros(1, 2, 64, 8, dtype=torch.float64)
    k = torch.zeros_like(q)
    q[..., 0] = 6.0
    k[..., 0] = torch.arange(8).repeat_interleave(8) / 8  # later blocks are wanted more
    levels = module.route(q, k)
    shown = levels.masked_fill(levels == 0, 99)
    assert (shown[..., 1:] <= shown[..., :-1]).all()
    if mode == "rank":
        assert levels[0, 0, 0].tolist() == [0, 0, 8, 8, 2, 2, 1, 1]


def test_text_similarity_and_mask_bound_the_levels():
    torch.manual_seed(0)
    q, k = draw(64, 4), draw(64)
    plain = layer(heads=4).route(q, k)
    assert (layer(text=9).route(q, k)[..., -2:] == 1).all()
    alike = layer(similar={2: 2.0, 4: 2.0, 8: 2.0}).route(q, k)  # no cosine is that large
    assert torch.equal(alike, plain.clamp(max=1))
    masked = layer(masked=True).route(q, k)
    assert (masked.triu(1) == 0).all()
    assert (masked.diagonal(dim1=2, dim2=3) == 1).all()
    assert (masked[..., 0] == 1).all()
    halves = layer(masked=True, shares={2: 0.5}).route(q, k)
    assert ((halves == 2).sum(-1) <= torch.arange(1, 9) // 2).all()
    assert ((halves == 2).sum(-1) >= torch.arange(1, 9) // 2 - 2).all()


def test_draws_decide_and_even_places_are_the_default():
    module, grid = layer(), Grid(64)
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    assert torch.equal(module(x, grid), module(x, grid))
    places = torch.tensor([[[1, 6]]])
    q, k, _ = module.qkv(x)
    by_hand = module.route(q, k, draws=(places, places))
    generator = torch.Generator().manual_seed(3)
    first = module.route(q, k, generator=generator)
    assert not torch.equal(first, module.route(q, k, generator=generator))
    assert torch.equal(first, module.route(q, k, generator=generator.manual_seed(3)))
    assert by_hand.shape == first.shape


def test_no_gradient_goes_through_the_choice_but_pooled_keys_learn():
    module, grid = layer(shares={2: 1.0}), Grid(64)
    x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    q, k, _ = module.qkv(x)
    assert not module.route(q, k).requires_grad
    module(x, grid).square().sum().backward()
    assert (module.qkv.weight.grad.abs().amax(1) > 0).all()


def test_computed_pairs_follow_the_density():
    for blocks in (20, 40, 80):
        n = 8 * blocks
        module = layer()
        q, k = draw(n, dtype=torch.float32), draw(n, dtype=torch.float32)
        levels = module.route(q, k)
        joined = join_banks(pyramid_banks(k, k, levels, n_q=n, blocks=(8, 8)), n)
        needed = explain(q, **joined._asdict()).pairs_needed
        assert needed == level_density(levels) * 4 * n * n
        assert level_density(levels) == pytest.approx(0.05 + 0.1 / 2 + 0.1 / 4 + 0.25 / 8)


def test_bfloat16():
    module, grid = layer().to(torch.bfloat16), Grid(50)
    assert module(torch.randn(1, 50, 16, dtype=torch.bfloat16), grid).isfinite().all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block": 0}, "block"),
        ({"block": 12}, "block"),
        ({"shares": {1: 0.5, 2: 0.2}}, "shares"),
        ({"shares": {}}, "shares"),
        ({"mode": "topk"}, "mode"),
        ({"text": -1}, "text"),
        ({"similar": {3: 0.5}}, "block"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        layer(**options)
    assert list(SHARES) == [1, 2, 4, 8]
