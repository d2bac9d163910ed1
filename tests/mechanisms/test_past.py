"""What decoding keeps: values that grow by tokens and never change in place."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from foveate.core.errors import ArgumentError
from foveate.mechanisms.past import Past, State, extend, length, past_bytes


class More(NamedTuple):
    k: Tensor
    v: Tensor
    worth: Tensor


def test_the_past_grows_and_the_old_one_stays():
    first = Past(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6))
    new = Past(torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2, 6))
    assert extend(None, first) is first
    both = extend(first, new)
    assert (length(None), length(first), length(both)) == (0, 4, 6)
    assert both.k[:, :, :4].equal(first.k)
    assert both.v[:, :, 4:].equal(new.v)
    assert first.k.shape[2] == 4


def test_a_mechanism_may_keep_more():
    one = More(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1))
    both = extend(one, one)
    assert isinstance(both, More)
    assert both.worth.shape == (1, 2, 2)


def test_what_does_not_fit_is_named():
    first = Past(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6))
    with pytest.raises(ArgumentError, match=r"^past: expected batch, heads and widths \(2, 1, 5\)"):
        extend(first, Past(torch.randn(2, 1, 1, 5), torch.randn(2, 1, 1, 6)))
    with pytest.raises(ArgumentError, match=r"^past: expected a More"):
        extend(first, More(first.k, first.v, torch.randn(2, 3, 4)))


def test_a_state_knows_its_length_and_its_bytes_do_not_grow():
    state = State(torch.zeros(2, 3, 4, 5), 1000)
    assert length(state) == 1000
    assert past_bytes(state) == 2 * 3 * 4 * 5 * 4
    past = Past(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4, dtype=torch.bfloat16))
    assert past_bytes(past) == 56 * 4 + 56 * 2
    assert past_bytes((state, [past, None], 3)) == past_bytes(state) + past_bytes(past)
