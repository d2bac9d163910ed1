"""Density peaks and the merging of clusters."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing.peaks import density_peaks, merge_clusters


def clouds(per=10):
    torch.manual_seed(0)
    middle = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    return (middle[:, None] + 0.3 * torch.randn(3, per, 2)).flatten(0, 1)[None].double()


def test_clouds_are_found():
    labels, centres = density_peaks(clouds(), 3, neighbours=4)
    assert {len(set(part.tolist())) for part in labels[0].split(10)} == {1}
    assert sorted((centres[0] // 10).tolist()) == [0, 1, 2]
    assert labels[0, centres[0]].tolist() == [0, 1, 2]


def test_by_the_definition():
    x = torch.randn(2, 17, 5, dtype=torch.float64)
    labels, centres = density_peaks(x, 4, neighbours=3)
    for b in range(2):
        d = (x[b, :, None] - x[b]).norm(dim=-1) / 5**0.5
        density = (-d.sort(1).values[:, :3].square().mean(1)).exp()
        reach = torch.stack(
            [d[i, density > density[i]].min() if (density > density[i]).any() else d.max() for i in range(17)]
        )
        expected = (reach * density).argsort(descending=True)[:4]
        assert centres[b].tolist() == expected.tolist()
        nearest = d[:, expected].argmin(1)
        nearest[expected] = torch.arange(4)
        assert labels[b].tolist() == nearest.tolist()


def test_ties_go_to_the_earlier_token_and_noise_breaks_them():
    x = torch.zeros(1, 6, 2).double()
    x[0, 3:] = 1.0  # two clouds of equal density
    assert sorted(density_peaks(x, 2, neighbours=3).centres[0].tolist()) == [0, 3]
    noise = torch.zeros(1, 6).double()
    noise[0, 5] = 1e-3
    assert density_peaks(x, 2, neighbours=3, noise=noise).centres[0, 0] == 5
    first, again = (
        density_peaks(x, 2, neighbours=3, generator=torch.Generator().manual_seed(1)).centres for _ in (0, 1)
    )
    assert torch.equal(first, again)
    every = density_peaks(x, 6, neighbours=3, ties=False)
    assert sorted(every.centres[0].tolist()) == list(range(6))


def test_merged_tokens_are_weighted_means():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    score = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 1, 2, 0, 2, 2], [2, 2, 2, 2, 2, 0, 0]])
    merged = merge_clusters(x, labels, 3, score=score)
    for b in range(2):
        for m in range(3):
            mine = labels[b] == m
            w = score[b, mine].exp()
            torch.testing.assert_close(merged[b, m], (w[:, None] * x[b, mine]).sum(0) / (w.sum() + 1e-6))
    assert torch.autograd.gradcheck(
        lambda x, s: merge_clusters(x, labels, 3, score=s), (x, score), fast_mode=True
    )
    large = merge_clusters(x, labels, 3, score=score + 1000)
    torch.testing.assert_close(large, merge_clusters(x, labels, 3, score=score, eps=0))


def test_one_cluster_each_keeps_the_tokens_and_bad_numbers_are_named():
    x = clouds(3)
    labels, centres = density_peaks(x, 9, neighbours=2)
    assert torch.equal(labels[0, centres[0]], torch.arange(9))
    with pytest.raises(ArgumentError, match="count"):
        density_peaks(x, 10, neighbours=2)
    with pytest.raises(ArgumentError, match="neighbours"):
        density_peaks(x, 2, neighbours=0)
