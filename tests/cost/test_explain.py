"""explain(): numbers against brute force, the same for tensors and bare shapes, quick, and readable."""

import io
import time

import pytest
import torch
from rich.console import Console

from foveate.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from foveate.cost.explain import explain
from foveate.cost.render import amount
from foveate.kernels.select import BACKENDS
from foveate.patterns.basic import Causal, Explicit, SlidingWindow
from foveate.patterns.grids import Neighborhood, Windows
from foveate.patterns.selection import Selection
from foveate.scores.bias import KeyBias


def shapes(n, b=2, h=4, hkv=2, d=8, d_v=16):
    return (b, h, n, d), (b, hkv, n, d), (b, hkv, n, d_v)


@pytest.mark.parametrize(
    "where",
    [Neighborhood((10, 12), 5), Windows((10, 12), 4, 1), Causal(), SlidingWindow(9) | ~Causal()],
    ids=repr,
)
def test_counts(where):
    e = explain(*shapes(120), where=where)
    assert e.pairs_needed == int(where.dense(120).sum()) * 8
    assert e.pairs_dense == 120 * 120 * 8
    assert e.flops == 2 * e.pairs_computed * (8 + 16)
    assert e.flops_backward == 2 * e.pairs_computed * (3 * 8 + 2 * 16)
    assert e.speedup_bound == e.pairs_dense / e.pairs_computed


def test_tensors_and_shapes_agree():
    where = Neighborhood((10, 12), 5)
    bare = explain(*shapes(120), where=where)
    real = explain(*(torch.randn(s) for s in shapes(120)), where=where)
    assert bare == real
    assert explain(*shapes(120), where=where, dtype=torch.bfloat16).bytes * 2 == bare.bytes


def test_bytes_of_dense_attention():
    e = explain(*shapes(64), backend="sdpa")
    assert e.bytes == 4 * (2 * 4 * 64 * 24 + 2 * 2 * 64 * 24)


def test_same_arguments_as_attend():
    e = explain(*shapes(120), where=Causal(), score=KeyBias(torch.zeros(120)), return_lse=True, scale=0.1)
    assert "lse" in e.reasons["sdpa"]
    with pytest.raises(ArgumentError, match="scale"):
        explain(*shapes(120), scale="much")
    with pytest.raises(UnsupportedError, match="lse"):
        explain(*shapes(120), return_lse=True, backend="sdpa")
    with pytest.raises(UnknownNameError, match="tiles"):
        explain(*shapes(120), backend="tilse")
    with pytest.raises(ArgumentError, match="where"):
        explain(*shapes(120), where=torch.ones(120, 120))


def test_routed():
    ids = torch.arange(120).view(1, 1, 4, 30)
    e = explain(*shapes(120), where=Selection(ids, ids, n_q=120, n_k=120), backend="tiles")
    assert e.pairs_needed == e.pairs_computed == 8 * 4 * 900
    assert (e.full_tiles, e.partial_tiles, e.tile) == (32, 0, None)


@pytest.mark.parametrize("grid", [(1024, 1024), (64, 128, 128)])
def test_a_million_tokens_take_milliseconds(grid):
    n = 1 << 20
    # No such pattern was lowered before: nothing comes from a cache.
    where = Neighborhood(grid, 9)
    start = time.perf_counter()
    e = explain(*shapes(n), where=where)
    seconds = time.perf_counter() - start
    assert e.pairs_needed == 8 * n * 9 ** len(grid)
    assert seconds < 1.0  # some 10 ms on a machine with nothing else to do


def test_no_pairs():
    e = explain(*shapes(6), where=Explicit(torch.zeros(6, 6, dtype=torch.bool)), backend="tiles")
    assert e.pairs_needed == e.pairs_computed == 0
    assert "no pair is computed" in str(e)


def test_it_prints():
    e = explain(*shapes(4096, h=8), where=Neighborhood((64, 64), 13))
    text = str(e)
    for word in ("Neighborhood(Grid(64, 64), 13)", "tiles", "needed", "computed", "bound", e.backend):
        assert word in text
    assert all(name in text for name in BACKENDS)
    assert all(reason in text for reason in e.reasons.values())
    out = io.StringIO()
    Console(file=out, width=200).print(e)
    for label in ("pairs needed", "speed-up bound", *e.reasons.values()):
        assert label in out.getvalue()


def test_amounts():
    assert amount(0) == "0"
    assert amount(999) == "999"
    assert amount(5_537_792) == "5.54 M"
    assert amount(2.5e9, "FLOP") == "2.5 GFLOP"
