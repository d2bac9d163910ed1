"""Online k-means and the members of clusters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.routing.clusters import OnlineKMeans, on_sphere, top_members


def test_rows_on_the_sphere_have_norm_sqrt_d_and_forget_their_scale():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        on_sphere(x).norm(dim=-1), torch.full((3,), 8.0**0.5, dtype=torch.float64), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(on_sphere(5 * x), on_sphere(x), rtol=1e-4, atol=1e-5)


@given(n=st.integers(1, 20), data=st.data())
def test_members_are_ascending_distinct_and_the_best(n, data):
    size = data.draw(st.integers(1, n))
    affinity = torch.randn(2, 3, n, 4)
    members = top_members(affinity, size)
    assert members.shape == (2, 3, 4, size)
    assert (members.diff(dim=-1) > 0).all()
    chosen = affinity.transpose(2, 3).gather(-1, members).amin(-1)
    assert chosen.equal(affinity.transpose(2, 3).topk(size, dim=-1).values[..., -1])


def test_strided_members_span_the_order():
    affinity = torch.arange(7.0).reshape(1, 1, 7, 1)
    assert top_members(affinity, 3, strided=True)[0, 0, 0].tolist() == [2, 4, 6]
    with pytest.raises(ArgumentError, match="size"):
        top_members(affinity, 8)


def test_without_memory_centroids_move_to_the_mean_of_their_members():
    centroids = OnlineKMeans(2, 3, 4, decay=0.0).double()
    x = on_sphere(torch.randn(2, 2, 30, 4, dtype=torch.float64))
    nearest = centroids(x).argmax(-1)
    centroids.update(x)
    for h in range(2):
        for c in range(3):
            mine = x[:, h][nearest[:, h] == c]
            assert len(mine)
            torch.testing.assert_close(centroids.means[h, c], mine.mean(0), rtol=1e-4, atol=1e-5)


def test_padding_moves_nothing():
    x = on_sphere(torch.randn(1, 1, 6, 4))
    present = torch.tensor([[True, True, True, False, False, False]])
    one, other = OnlineKMeans(1, 2, 4, decay=0.5), OnlineKMeans(1, 2, 4, decay=0.5)
    other.load_state_dict(one.state_dict())
    one.update(x, present)
    other.update(x[:, :, :3])
    torch.testing.assert_close(one.means, other.means)


def test_centroids_nobody_chose_stay():
    centroids = OnlineKMeans(1, 2, 4, decay=0.9)
    centroids.means[0, 1] = -centroids.means[0, 0]
    centroids.ema_means.copy_(centroids.means)
    before = centroids.means.clone()
    centroids.update(before[:, :1].expand(1, 1, 5, 4))
    torch.testing.assert_close(centroids.means, before, rtol=1e-3, atol=1e-3)


def test_the_counting_bug_shows_with_several_heads_only():
    x = on_sphere(torch.randn(2, 3, 5, 4))
    for heads, same in ((1, True), (3, False)):
        right, wrong = OnlineKMeans(heads, 2, 4, official=False), OnlineKMeans(heads, 2, 4, official=True)
        wrong.load_state_dict(right.state_dict())
        right.update(x[:, :heads])
        wrong.update(x[:, :heads])
        assert torch.equal(right.ema_count, wrong.ema_count) is same


def test_commitment_pulls_tokens_not_centroids():
    centroids = OnlineKMeans(1, 2, 4).double()
    x = torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    centroids.commitment(x).backward()
    nearest = centroids.means[0, centroids(x)[0, 0].argmax(-1)]
    torch.testing.assert_close(x.grad[0, 0], 2 * (x[0, 0] - nearest).detach() / x.numel())
