"""What every pattern is: a value (equal, hashable, printable, picklable) and a FlexAttention mask_mod."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from foveate.core.errors import ArgumentError
from foveate.patterns import (
    BlockList,
    Causal,
    Explicit,
    Full,
    Halo,
    Lattice,
    Neighborhood,
    Sinks,
    SlidingWindow,
    Windows,
    with_specials,
)
from tests.patterns.strategies import copy_of, patterns

SAMPLES = [
    Full(),
    Causal(),
    SlidingWindow(3, 2),
    Sinks(2) | SlidingWindow(2),
    Neighborhood((6, 4), (3, 2), (2, 1), (1, 2), (True, False)),
    Windows((6, 4), 3, (1, 2)),
    Halo((6, 4), 2, 1),
    Halo((6, 4), 2, 1, "clamp"),
    Halo((6, 4), 2, 1, "zero"),
    Lattice((6, 4), 2),
    Explicit(torch.arange(24 * 24).view(24, 24) % 5 == 0),
    BlockList((5, 7), [(0, 0), (1, 3), (4, 2)]),
    with_specials(Neighborhood((5, 4), 3), 4),
    with_specials(Neighborhood((5, 4), 3), 4, "isolated"),
    with_specials(Neighborhood((5, 4), 3), 4, Causal()),
    ~Causal() & Windows(24, 6),
]


@pytest.mark.parametrize("pattern", SAMPLES, ids=repr)
def test_flex_attention_takes_the_mask_mod(pattern):
    dense = pattern.dense(24)
    got = create_mask(pattern.mask_mod, 1, 1, 24, 24, device="cpu")
    assert torch.equal(got[0, 0].bool(), dense)
    blocks = create_block_mask(pattern.mask_mod, 1, 1, 24, 24, device="cpu", BLOCK_SIZE=8)
    want = dense.view(3, 8, 3, 8).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), want)


@given(st.data())
def test_mask_mod_for_other_lengths(data):
    n_q, n_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    pattern = data.draw(patterns(n_q, n_k))
    got = create_mask(pattern.mask_mod_for(n_q, n_k), 1, 1, n_q, n_k, device="cpu")
    assert torch.equal(got[0, 0].bool(), pattern.dense(n_q, n_k))


@given(st.data())
def test_a_pattern_is_a_value(data):
    n = data.draw(st.integers(1, 12))
    pattern = data.draw(patterns(n, n))
    others = [copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))]
    if "<" not in repr(pattern):  # A large explicit mask is abbreviated.
        others.append(copy_of(pattern))
    for other in others:
        assert other == pattern
        assert hash(other) == hash(pattern)
        assert repr(other) == repr(pattern)
        assert {pattern: 1}[other] == 1
        assert torch.equal(other.dense(n), pattern.dense(n))


def test_reprs_read_like_what_was_written():
    assert repr(Neighborhood((64, 64), 13)) == "Neighborhood(Grid(64, 64), 13)"
    assert repr(Neighborhood((8, 8), (3, 5), stride=2)) == "Neighborhood(Grid(8, 8), (3, 5), stride=2)"
    assert repr(Causal()) == "Causal()"
    assert repr(Halo((8, 8), 4, 1, "zero")) == "Halo(Grid(8, 8), 4, 1, 'zero')"
    assert repr(with_specials(Causal(), 2)) == "with_specials(Causal(), 2)"
    assert repr(SlidingWindow(7) | Sinks(1)) == "(SlidingWindow(7) | Sinks(1))"


def test_patterns_of_different_classes_differ():
    assert Windows(4, 2) != Lattice(4, 2)
    assert Causal() != Full()
    assert len({Causal(), Causal("end"), Causal("start")}) == 2


@pytest.mark.parametrize("pattern", SAMPLES, ids=repr)
def test_immutable(pattern):
    with pytest.raises(AttributeError, match="immutable"):
        pattern.window = 3
    with pytest.raises(AttributeError, match="immutable"):
        del pattern.grid


def test_the_mask_is_made_on_the_device_asked_for():
    assert Neighborhood(8, 3).dense(device="meta").device.type == "meta"


def test_operators_refuse_strangers():
    with pytest.raises(TypeError):
        Causal() & 3
    with pytest.raises(TypeError):
        Causal() | torch.ones(3, 3)


def test_lengths_come_from_the_grid_and_must_agree_with_it():
    assert Neighborhood((4, 5), 3).dense().shape == (20, 20)
    assert (Causal() & Neighborhood((4, 5), 3)).dense().shape == (20, 20)
    with pytest.raises(ArgumentError, match="n_q: expected 20 tokens"):
        Neighborhood((4, 5), 3).dense(19)
    with pytest.raises(ArgumentError, match="n_k: expected 20 tokens"):
        Neighborhood((4, 5), 3).dense(20, 40)
