"""Power-of-two blocks: the printed algorithm, its theorems, and cells without anything of size N x N."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.patterns.lower import lower
from foveate.patterns.power import PowerBlocks
from tests.patterns.strategies import copy_of
from tests.patterns.test_lower import check


def by_the_book(where, n_q, n_k):
    """The printed algorithm, pair by pair."""
    mask = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        q = i + n_k - n_q
        for k in range(n_k):
            distance = q // where.block - k // where.block
            seen = distance < where.window or distance in {2**p for p in range(20)}
            mask[i, k] = q >= k and (seen or k < where.block * where.sinks)
    return mask


powers = st.builds(PowerBlocks, st.sampled_from([1, 2, 3, 5, 16, 17]), st.integers(1, 4), st.integers(0, 2))


@given(powers, st.integers(0, 70), st.integers(0, 70), st.one_of(st.none(), st.integers(1, 9)))
def test_cells_are_the_printed_algorithm(where, n_q, n_k, tile):
    dense = by_the_book(where, n_q, n_k)
    assert torch.equal(where.dense(n_q, n_k), dense)
    assert copy_of(where) == where
    check(lower(where, n_q, n_k, tile), dense, closed=False)


def test_composes():
    where = PowerBlocks(16, 2) & SlidingWindow(40)
    check(
        lower(where, 70), by_the_book(PowerBlocks(16, 2), 70, 70) & SlidingWindow(40).dense(70), closed=False
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_every_token_within_a_distance_of_2_to_the_layers_is_reached(layers):
    n = 70
    step = PowerBlocks(1, 1, sinks=0).dense(n).float()
    reach = torch.linalg.matrix_power(step, layers) > 0
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    assert reach[(distance >= 0) & (distance < 2**layers)].all()
    # Exactly: a distance takes as many steps as it has ones.
    ones = torch.tensor([bin(abs(d)).count("1") for d in distance.flatten().tolist()]).reshape(n, n)
    assert torch.equal(reach, (distance >= 0) & (ones <= layers))


def test_a_window_of_the_same_size_reaches_only_in_proportion():
    n, layers = 200, 3
    power = PowerBlocks(1, 1, sinks=0).dense(n)
    width = int(power.sum(1).max())
    window = SlidingWindow(width - 1).dense(n).float()
    reached = (torch.linalg.matrix_power(window, layers) > 0)[-1].nonzero().min()
    assert n - 1 - int(reached) == layers * (width - 1)
    # Steps of two blocks miss all odd distances, however many layers there are.
    distance = torch.arange(n)[:, None] - torch.arange(n)
    dilated = ((distance >= 0) & (distance % 2 == 0)).float()
    assert not (torch.linalg.matrix_power(dilated, 8) > 0)[distance % 2 == 1].any()


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3))
def test_degree_is_logarithmic(n, block, window, sinks):
    where = PowerBlocks(block, window, sinks)
    blocks = -(-n // block)
    bound = math.floor(math.log2(blocks)) + 1 + window + sinks
    assert max(len(where.key_blocks(b)) for b in range(blocks)) <= bound


def test_large_blocks_or_windows_are_causal_attention():
    for where in (PowerBlocks(50), PowerBlocks(64), PowerBlocks(8, 7), PowerBlocks(8, 1, sinks=7)):
        assert torch.equal(where.dense(50), Causal().dense(50))


@pytest.mark.parametrize(("block", "window"), [(256, 5), (64, 1), (1, 4)])
def test_long_sequences_lower_to_what_they_need(block, window):
    n = 131072 if block > 1 else 4096
    where = PowerBlocks(block, window)
    schedule = lower(where, n)
    degrees = [len(where.key_blocks(b)) * block for b in range(n // block)]
    needed = sum(block * d for d in degrees) - n * (block - 1) // 2
    assert schedule.pairs_needed == needed
    if block > 1:
        assert schedule.pairs_computed - needed == n * (block - 1) // 2  # the upper halves of the diagonal
        assert sum(group.nbytes for group in schedule.groups) < 100e6
        assert len(schedule.groups) < 20


@pytest.mark.parametrize("backend", ["auto", "tiles", "cpu"])
def test_backends_run_the_cells(backend):
    if backend == "cpu":
        from foveate.kernels.cpu.library import absent

        if absent() is not None:
            pytest.skip("the core is not built")
    q, k, v = (torch.randn(2, h, 150, 8) for h in (4, 2, 2))
    where = PowerBlocks(16, 2)
    want = attend(q, k, v, where=where, backend="reference")
    torch.testing.assert_close(attend(q, k, v, where=where, backend=backend), want)
    # Decoding: the last queries alone give the same rows.
    last = attend(q[:, :, -5:], k, v, where=where, backend=backend)
    torch.testing.assert_close(last, want[:, :, -5:])


def test_bad_arguments_are_named():
    for arguments, name in (((0,), "block"), ((4, 0), "window"), ((4, 1, -1), "sinks")):
        with pytest.raises(ArgumentError, match=name):
            PowerBlocks(*arguments)
