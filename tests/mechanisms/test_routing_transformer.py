"""Routing Transformer: what its equations promise."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.mechanisms.routed.routing_transformer import ClusterRouting, RoutingAttention
from foveate.patterns.basic import Causal
from foveate.routing.clusters import on_sphere


def qkv(n=12, h=2, d=4):
    return tuple(torch.randn(2, h, n, d, dtype=torch.float64) for _ in range(3))


def routing(clusters, members, h=2, d=4, **options):
    return ClusterRouting(heads=h, width=d, clusters=clusters, members=members, **options).double().eval()


@pytest.mark.parametrize("clusters", [1, 3])
def test_cells_with_all_tokens_are_full_attention(clusters):
    q, k, v = qkv()
    full = attend(on_sphere(q), on_sphere(k), v, scale=1.0)
    out = routing(clusters, 12)(q, k, v).out
    torch.testing.assert_close(out, clusters * full / (clusters + 0.01))


def test_tokens_in_no_cell_get_zero_and_those_in_one_are_divided_by_1_01():
    q, k, v = qkv()
    module = routing(1, 5)
    selection = module.select(on_sphere(q), on_sphere(k))
    out, taken = module(q, k, v).out, selection.dense().any(-1)
    assert out[~taken].eq(0).all()
    assert taken.sum() == 2 * 2 * 5
    ids, keys = selection.cells[0].q_ids[0, 0, 0], selection.cells[0].k_ids[0, 0, 0]
    cell = attend(on_sphere(q)[:1, :1, ids], on_sphere(k)[:1, :1, keys], v[:1, :1, keys], scale=1.0)
    torch.testing.assert_close(out[0, 0, ids], cell[0, 0] / 1.01)


def test_ids_inside_a_cell_are_ascending():
    q, k, _ = qkv()
    cells = routing(3, 4).select(on_sphere(q), on_sphere(k)).cells[0]
    assert (cells.q_ids.diff(dim=-1) > 0).all()
    assert (cells.k_ids.diff(dim=-1) > 0).all()


def test_masked_cells_never_look_ahead():
    q, k, _ = qkv()
    for share_qk in (False, True):
        dense = routing(3, 6, masked=True, share_qk=share_qk).select(on_sphere(q), on_sphere(k)).dense()
        assert not (dense & ~Causal().dense(12)).any()
    # by rank, as the authors do, later keys are seen when queries and keys are not shared
    by_rank = routing(3, 6, masked=True, official=True).select(on_sphere(q), on_sphere(k)).dense()
    assert (by_rank & ~Causal().dense(12)).any()


def test_shared_vectors_make_the_two_masks_one():
    q, k, v = qkv()
    ours, theirs = (routing(3, 6, masked=True, share_qk=True, official=o) for o in (False, True))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(q, k, v).out, theirs(q, k, v).out)


def test_not_causal_because_later_tokens_change_the_choice():
    q, k, v = qkv(n=16)
    module = routing(4, 3, masked=True, share_qk=True)
    before = module(q, k, v).out
    q2 = q.clone()
    q2[:, :, 8:] = torch.randn_like(q2[:, :, 8:])
    assert not torch.allclose(before[:, :, :8], module(q2, k, v).out[:, :, :8])


def test_the_choice_gets_no_gradient_but_attention_does():
    q, k, v = (x.requires_grad_() for x in qkv())
    module = routing(2, 6)
    module(q, k, v).out.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))
    assert not any(p.requires_grad for p in module.parameters())


def test_training_moves_centroids_and_evaluation_does_not():
    q, k, v = qkv()
    module = routing(2, 6, decay=0.5)
    before = module.centroids.means.clone()
    module(q, k, v)
    assert module.centroids.means.equal(before)
    module.train()(q, k, v)
    assert not module.centroids.means.equal(before)


def test_padding_is_attended_by_nobody():
    q, k, v = qkv()
    present = torch.ones(2, 12, dtype=torch.bool)
    present[:, 9:] = False
    module = routing(1, 12)
    v2 = v.clone()
    v2[:, :, 9:] = 100.0
    torch.testing.assert_close(module(q, k, v, present=present).out, module(q, k, v2, present=present).out)


def test_module_mixes_local_and_routed_heads_and_reports_its_loss():
    module = RoutingAttention(dim=16, heads=4, clusters=3, members=6, window=2)
    x = torch.randn(2, 12, 16, requires_grad=True)
    out = module(x, Grid(3, 4))
    assert out.shape == x.shape
    assert module.commitment_loss is not None
    (out.sum() + module.commitment_loss).backward()
    assert module.qkv.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "name"),
    [({"routed_heads": 0}, "routed_heads"), ({"clusters": 0}, "clusters"), ({"members": -1}, "members")],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ArgumentError, match=name):
        RoutingAttention(**{"dim": 16, "heads": 4, "clusters": 2, "members": 2, **options})
    with pytest.raises(ArgumentError, match="causal"):
        RoutingAttention.for_workload(dim=16, grid=Grid(16), heads=4, causal=True)
