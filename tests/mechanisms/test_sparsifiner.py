"""Sparsifiner: what its equations promise."""

import math

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.routed.sparsifiner import SparsifinerAttention
from foveate.routing.lowrank import Sparsity

GRID = Grid(4, 4)


def layer(keep=0.25, class_token=True, grid=GRID, **options):
    sparsity = Sparsity(keep=keep, **options.pop("sparsity", {}))
    module = SparsifinerAttention(
        dim=8, heads=2, grid=grid, class_token=class_token, sparsity=sparsity, reduce_n=2, **options
    ).double()
    with torch.no_grad():  # as large as after training, so that basis and coefficients differ between rows
        for parameter in module.predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return module


def tokens(n=17, batch=2):
    return torch.randn(batch, n, 8, dtype=torch.float64)


def dense(module, x):
    return module.proj(merge_heads(functional.scaled_dot_product_attention(*module.qkv(x))))


@pytest.mark.parametrize("class_token", [False, True])
def test_keeping_all_is_full_attention(class_token):
    module, x = layer(1.0, class_token), tokens(16 + class_token)
    torch.testing.assert_close(module(x, GRID), dense(module, x))


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6])
def test_rows_have_exactly_their_budget_and_the_class_token_sees_all(keep):
    seen = layer(keep).predict(tokens(), GRID).where.dense()
    assert seen.shape == (2, 2, 17, 17)
    assert seen[:, :, 0].all()
    assert (seen[:, :, 1:].sum(-1) == math.ceil(keep * 17)).all()


def test_attention_runs_on_the_best_predicted_keys():
    module, x = layer(0.25), tokens()
    prediction = module.predict(x, GRID)
    matrix = prediction.matrix()
    seen = torch.zeros_like(matrix, dtype=torch.bool).scatter(-1, matrix.topk(5, dim=-1).indices, True)
    seen = torch.cat([torch.ones_like(seen[:, :, :1]), seen], dim=2)
    out = functional.scaled_dot_product_attention(*module.qkv(x), attn_mask=seen)
    torch.testing.assert_close(module(x, GRID), module.proj(merge_heads(out)))
    weights = module.attention_map(x, GRID)
    assert (weights[~seen] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17, dtype=torch.float64))


@pytest.mark.parametrize(("keep", "listed"), [(0.05, True), (0.25, False)])
def test_keys_are_listed_only_where_few_are_kept(keep, listed):
    grid = Grid(8, 8)
    module, x = layer(keep, grid=grid), tokens(65)
    prediction = module.predict(x, grid)
    cell, budget = prediction.where.cells[0], math.ceil(keep * 65)
    assert (cell.q_ids.shape[3] == 1) == listed
    seen = torch.zeros(2, 2, 64, 65, dtype=torch.bool)
    seen.scatter_(-1, prediction.matrix().topk(budget, dim=-1).indices, True)
    assert prediction.where.dense()[:, :, 1:].equal(seen)


def test_a_threshold_in_place_of_a_budget():
    module, x = layer(sparsity={"score_threshold": 0.3}), tokens()
    prediction = module.predict(x, GRID)
    assert prediction.where.dense()[:, :, 1:].equal(prediction.matrix() > 0.3)
    nobody = layer(sparsity={"score_threshold": 1e9})
    weights = nobody.attention_map(x, GRID)
    assert weights[:, :, 1:].eq(0).all()
    assert nobody(x, GRID).isfinite().all()


def test_no_gradient_goes_through_the_mask():
    module, x = layer(), tokens().requires_grad_()
    module.train()(x, GRID).square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.predictor.parameters())
    assert module.qkv.weight.grad.abs().sum() > 0


def test_reconstruction_is_dense_and_its_loss_reaches_the_predictor_alone():
    module, x = layer(), tokens()
    out, loss = module.forward_reconstruct(x, GRID)
    torch.testing.assert_close(out, dense(module, x))
    q, k, _ = module.qkv(x)
    matrix = module.predictor(q[:, :, 1:], k) @ module.predictor.basis
    truth = (q @ k.mT / 2).softmax(-1)[:, :, 1:]
    torch.testing.assert_close(loss, (matrix - truth.detach()).square().sum())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in module.predictor.parameters())
    others = module.forward_reconstruct(x, GRID, teacher=(k, q))[1]
    torch.testing.assert_close(others, (matrix - (k @ q.mT / 2).softmax(-1)[:, :, 1:]).square().sum())


def test_the_predictor_learns_the_teachers_connectivity():
    torch.manual_seed(3)
    grid = Grid(6, 6)
    module = SparsifinerAttention(
        dim=16, heads=2, grid=grid, reduce_n=2, sparsity=Sparsity(coefficients=None)
    )
    # Teachers look around themselves: queries and keys carry positions, and noise of their own.
    at = grid.coords().float() / 2
    code = torch.cat([at.sin(), at.cos(), (2 * at).sin(), (2 * at).cos()], dim=1)
    with torch.no_grad():
        module.qkv.weight.zero_()
        for part in (0, 1):
            module.qkv.weight[16 * part : 16 * part + 16] = 2 * torch.eye(16)
    module.requires_grad_(False)
    module.predictor.requires_grad_(True)

    def batch(size):
        return torch.cat([code, code], dim=1) + 0.3 * torch.randn(size, 36, 16)

    def recall():
        x = batch(8)
        q, k, _ = module.qkv(x)
        best = (q @ k.mT).topk(9, dim=-1).indices
        return module.predict(x, grid).where.dense().gather(-1, best).double().mean().item()

    before, losses = recall(), []
    step = torch.optim.Adam(module.predictor.parameters(), 0.03)
    for _ in range(200):
        loss = module.forward_reconstruct(batch(8), grid)[1]
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    after = recall()
    assert losses[-1] < 0.5 * losses[0]
    assert before < 0.4  # a fourth of the keys at random
    assert after > 0.6


def test_pruning_keeps_what_the_class_token_attends_to():
    module, x = layer(token_keep=0.4), tokens()
    first = module.forward_pruned(x, GRID)
    assert (first.kept.sum(1) == math.ceil(0.4 * 16)).all()
    score = module.attention_map(x, GRID)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(score[first.kept].view(2, -1).amin(1) >= score.masked_fill(first.kept, 0).amax(1),
                               torch.ones(2, dtype=torch.bool))  # fmt: skip
    second = module.forward_pruned(x, GRID, kept=first.kept)
    assert not (second.kept & ~first.kept).any()
    seen = module.predict(x, GRID, kept=first.kept).where.dense()
    lost = ~torch.cat([torch.ones(2, 1, dtype=torch.bool), first.kept], 1)
    assert not (seen & lost[:, None, None, :]).any()
    assert not (seen & lost[:, None, :, None]).any()
    assert (seen.sum(-1)[~lost[:, None].expand(2, 2, 17)].unflatten(0, (2, 2, -1))[:, :, 1:] == 5).all()
    # What pruned tokens hold changes nothing for the others.
    other = torch.where(lost[..., None], torch.randn_like(x), x)
    torch.testing.assert_close(module(other, GRID).shape, x.shape)
    again = module.forward_pruned(other, GRID, kept=first.kept).out
    torch.testing.assert_close(again[~lost], second.out[~lost])


def test_pruned_tokens_do_not_exist_unless_the_authors_say_so():
    ours, theirs = layer(), layer(official=True)
    theirs.load_state_dict(ours.state_dict())
    theirs.predictor.scale = ours.predictor.scale
    x, kept = tokens(), torch.rand(2, 16) > 0.4
    kept[:, :6] = True
    q, k, v = ours.qkv(x)
    present = torch.cat([torch.ones(2, 1, dtype=torch.bool), kept], 1)
    mask = present[:, None, None, :]
    alone = functional.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=mask)
    torch.testing.assert_close(
        ours.forward_pruned(x, GRID, kept=kept).out[:, :1], ours.proj(merge_heads(alone))
    )
    counted = functional.scaled_dot_product_attention(q[:, :, :1], k * mask.mT, v * mask.mT)
    torch.testing.assert_close(
        theirs.forward_pruned(x, GRID, kept=kept).out[:, :1], theirs.proj(merge_heads(counted))
    )


def test_samples_may_keep_different_numbers_and_calls_leave_no_state():
    module, x = layer(0.6), tokens()
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0, :3], kept[1, :] = True, True
    together = module.forward_pruned(x, GRID, kept=kept).out
    torch.testing.assert_close(together[1:], module.forward_pruned(x[1:], GRID, kept=kept[1:]).out)
    torch.testing.assert_close(together[1:], module(x[1:], GRID))
    seen = module.predict(x, GRID, kept=kept).where.dense()[:, :, 1:].sum(-1)
    assert (seen[0, :, :3] == 4).all()
    assert (seen[0, :, 3:] == 0).all()
    assert (seen[1] == 11).all()


def test_pairs_follow_the_budget():
    for side in (8, 12, 16):
        grid = Grid(side, side)
        module = SparsifinerAttention.for_workload(dim=8, grid=grid, heads=2)
        where = module.predict(torch.randn(1, side * side, 8), grid).where
        n = side * side
        assert where.schedule.pairs_needed == 2 * n * math.ceil(n / 4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"reduce_n": 0}, "reduce_n"),
        ({"reduce_c": 0}, "reduce_c"),
        ({"token_keep": 0.0}, "token_keep"),
        ({"token_keep": 0.5}, "token_keep"),
        ({"heads": 3}, "dim"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        SparsifinerAttention(**{"dim": 8, "heads": 2, "grid": GRID, **options})


def test_bad_inputs_are_named():
    module = layer()
    with pytest.raises(ArgumentError, match="kept"):
        module.forward_pruned(tokens(), GRID, kept=torch.ones(2, 17, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="grid"):
        module(tokens(), Grid(2, 8))
    with pytest.raises(ArgumentError, match="x"):
        module(tokens(16), GRID)
