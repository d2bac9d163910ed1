"""Shared centres: steps of spherical k-means, and the buffer that follows them."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from foveate.core.errors import ArgumentError
from foveate.routing.centres import SharedCentres, chunk_means, moved, nearest


def tokens(b=2, n=20, c=4):
    return torch.randn(b, n, c, dtype=torch.float64)


def test_a_step_moves_centres_to_the_direction_of_their_members():
    x, centres = tokens(), torch.randn(3, 4, dtype=torch.float64)
    new, ids = moved(x, centres), nearest(x, centres)
    unit = functional.normalize(x, dim=-1)
    for m in range(3):
        torch.testing.assert_close(new[m], functional.normalize(unit[ids == m].sum(0), dim=0))
    torch.testing.assert_close(new.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_centres_without_members_stay():
    x = torch.tensor([[[1.0, 0.1], [1.0, -0.1]]])
    new = moved(x, torch.tensor([[2.0, 0.0], [-3.0, 0.0]]))
    torch.testing.assert_close(new, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_steps_raise_the_mean_cosine():
    x, centres = tokens(n=200), functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=-1)
    fit = lambda c: (functional.normalize(x, dim=-1) @ functional.normalize(c, dim=-1).mT).amax(-1).mean()  # noqa: E731
    values = [fit(centres)]
    for _ in range(5):
        centres = moved(x, centres)
        values.append(fit(centres))
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


def test_only_the_last_step_carries_gradients_and_the_choice_none():
    module, x = SharedCentres(3, 4, iterations=3).double(), tokens().requires_grad_()
    module.initted.fill_(True)
    centres = module(x)
    (mine,) = torch.autograd.grad(centres.square().sum() + centres.sum(), x)
    before = module.means
    for _ in range(2):
        before = moved(x.detach(), before)
    last = moved(x, before)
    (theirs,) = torch.autograd.grad(last.square().sum() + last.sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_the_first_batch_sets_the_buffer_and_later_ones_draw_it():
    module, x = SharedCentres(3, 4, decay=0.75).double(), tokens()
    first = module(x)
    module.follow(first)
    assert bool(module.initted)
    assert module.means.equal(first)
    second = module(tokens())
    module.follow(second)
    torch.testing.assert_close(module.means, 0.75 * first + 0.25 * second)


def test_evaluation_returns_the_buffer_whatever_the_batch():
    module = SharedCentres(3, 4).double().eval()
    assert module(tokens()).equal(module.means)
    theirs = SharedCentres(3, 4, official=True).double().eval()
    x = tokens()
    torch.testing.assert_close(theirs(x), chunk_means(x, 3, official=True))


@pytest.mark.parametrize(
    ("n", "count", "official"), [(20, 5, False), (21, 5, False), (20, 5, True), (3, 4, False)]
)
def test_pieces_are_averaged_with_a_mirrored_end(n, count, official):
    x = tokens(n=n)
    missing = -n % count + (count if official and n % count == 0 else 0)
    long = torch.cat([x, x[:, n - missing :].flip(1)], 1)
    truth = torch.stack([piece.mean((0, 1)) for piece in long.chunk(count, 1)])
    torch.testing.assert_close(chunk_means(x, count, official=official), truth)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SharedCentres(0, 4), "count"),
        (lambda: SharedCentres(3, 4, iterations=0), "iterations"),
        (lambda: SharedCentres(3, 4, decay=1.0), "decay"),
        (lambda: chunk_means(tokens(n=3), 9), "count"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ArgumentError, match=name):
        call()
