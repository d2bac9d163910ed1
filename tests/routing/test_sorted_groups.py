"""Sorted groups: which keys each group sees, at the end of the order too."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.routing.sorted_groups import sorted_groups


def orders(b=2, n=10):
    return torch.stack([torch.randperm(n) for _ in range(b)])


@pytest.mark.parametrize(("n", "size", "after"), [(10, 3, 1), (12, 4, 1), (7, 2, 2), (5, 9, 1), (9, 3, 0)])
def test_groups_see_themselves_and_the_next_in_windows_of_equal_size(n, size, after):
    order = orders(n=n)
    seen = sorted_groups(order, size, after=after).dense()[:, 0]
    width = min((1 + after) * min(size, n), n)
    for b in range(2):
        for place, token in enumerate(order[b].tolist()):
            first = min(place // size * size, n - width)
            assert seen[b, token].nonzero().flatten().tolist() == sorted(
                order[b, first : first + width].tolist()
            )


def test_reflection_counts_mirrored_tokens_twice():
    order = orders(n=10)
    where = sorted_groups(order, 4, reflect=True)
    count = where.schedule.expand()[:, 0]
    mirrored = torch.cat([order, order.flip(1)], 1)
    for b in range(2):
        for group, start in enumerate((0, 4, 8)):
            keys = mirrored[b, start : start + 8]
            truth = torch.bincount(keys, minlength=10)
            for token in order[b, start : start + 4].tolist():
                assert count[b, token].equal(truth.int()), group
    x = torch.randn(2, 1, 10, 4, dtype=torch.float64)
    out = attend(x, x, x, where=where)
    token = order[0, 9]
    keys = mirrored[0, 8:16]
    truth = torch.nn.functional.scaled_dot_product_attention(
        x[0, 0, token][None], x[0, 0, keys], x[0, 0, keys]
    )
    torch.testing.assert_close(out[0, 0, token], truth[0])


def test_one_group_is_everything():
    order = orders()
    assert sorted_groups(order, 10).dense().all()
    assert (sorted_groups(order, 10, reflect=True).schedule.expand() == 2).all()


def test_heads_may_have_orders_of_their_own():
    order = torch.stack([orders(), orders()], 1)
    assert sorted_groups(order, 4).batch == (2, 2)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sorted_groups(torch.zeros(3, dtype=torch.long), 1), "order"),
        (lambda: sorted_groups(torch.zeros(1, 3), 1), "order"),
        (lambda: sorted_groups(orders(), 0), "size"),
        (lambda: sorted_groups(orders(), 2, after=-1), "after"),
        (lambda: sorted_groups(orders(n=9), 8, reflect=True), "size"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ArgumentError, match=name):
        call()
