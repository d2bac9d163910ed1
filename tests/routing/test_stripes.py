"""Stripes: the keys that runs of queries find, against loops over every pair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.routing.stripes import StripeRouter

ROUTERS = st.builds(
    StripeRouter,
    block=st.integers(1, 4),
    step=st.integers(1, 3),
    # Never 0: with official bounds the key of the anchor is searched too, and would be tied with itself.
    theta=st.sampled_from([-1.0, 0.1, 1.0, 3.0]),
    init=st.integers(0, 2),
    local=st.integers(1, 2),
    each=st.booleans(),
    official=st.booleans(),
)


def inputs(n, kv_heads=1):
    return torch.randn(2, 2, n, 4, dtype=torch.float64), torch.randn(2, kv_heads, n, 4, dtype=torch.float64)


def near_by_hand(r, n):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    initial = r.init * (r.run if r.official else r.block)
    return ((j < initial) | (j // r.run > i // r.run - r.local)) & (j <= i)


def far_by_hand(r, logits, anchors, q, k):
    """Whether query i finds key j, pair by pair."""
    b, h, n, _ = logits.shape
    found = torch.zeros(b, h, n, n, dtype=torch.bool)
    for start in range(0, n, r.run):
        stop = min(start + r.run, n)
        first = r.block if r.official else r.init * r.block
        last = start - r.block if r.official else start - (r.local - 1) * r.run
        for j in range(first, max(last, first)):
            if r.each:
                found[:, :, start:stop, j] = (
                    logits[:, :, start:stop, j] + r.theta >= anchors[:, :, start:stop]
                )
                continue
            for s in range(start, stop, r.block):
                rows = slice(s, min(s + r.block, stop))
                hit = logits[:, :, rows, j].mean(-1) + r.theta >= anchors[:, :, rows].mean(-1)
                found[:, :, start:stop, j] |= hit[..., None]
    return found


@given(r=ROUTERS, n=st.integers(1, 26), seed=st.integers(0, 20))
def test_near_anchors_and_search_are_what_loops_find(r, n, seed):
    torch.manual_seed(seed)
    q, k = inputs(n)
    logits = q @ k.transpose(-1, -2) * 0.5
    near = near_by_hand(r, n)
    assert r.near(n).dense()[0, 0].equal(near)
    anchors = r.anchors(q, k, 0.5)
    torch.testing.assert_close(anchors, logits.masked_fill(~near, float("-inf")).amax(-1))
    selection = r.select(q, k, anchors, 0.5)
    selection.schedule.validate()
    found = selection.dense().expand(2, 2, n, n)
    assert found.equal(far_by_hand(r, logits, anchors, q, k))
    if not r.official:
        assert not (found & near).any(), "a key is in both passes"


@pytest.mark.parametrize("each", [False, True])
def test_everything_is_found_without_a_limit_and_nothing_below_all(each):
    q, k = inputs(23, kv_heads=2)
    for theta, found in ((math.inf, True), (-math.inf, False)):
        r = StripeRouter(block=2, step=3, theta=theta, each=each)
        far = r.select(q, k, r.anchors(q, k, 0.5), 0.5).dense().expand(2, 2, 23, 23)
        rest = torch.ones(23, 23, dtype=torch.bool).tril() & ~r.near(23).dense()[0, 0]
        assert far.equal((rest & found).expand(far.shape))


def test_what_is_found_grows_with_theta():
    q, k = inputs(40)
    before = torch.zeros(2, 2, 40, 40, dtype=torch.bool)
    for theta in (-2.0, 0.0, 0.5, 1.0, 2.0):
        r = StripeRouter(block=2, step=4, theta=theta)
        now = r.select(q, k, r.anchors(q, k, 0.5), 0.5).dense()
        assert not (before & ~now).any()
        before = now


def test_coordinates_list_the_keys_of_runs():
    q, k = inputs(26)
    r = StripeRouter(block=2, step=4, theta=1.0)
    anchors = r.anchors(q, k, 0.5)
    ids, counts = r.coordinates(q, k, anchors, 0.5)
    dense = r.select(q, k, anchors, 0.5).dense()
    for run in range(4):
        for b, h in ((0, 0), (1, 1)):
            own = dense[b, h, run * 8].nonzero().flatten().tolist()
            count = int(counts[b, h, run])
            assert ids[b, h, run, :count].tolist() == own
            assert ids[b, h, run, count:].eq(0).all()
    with pytest.raises(ArgumentError, match="each"):
        StripeRouter(each=True).coordinates(q, k, anchors, 0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("block", 0), ("step", 0), ("init", -1), ("local", 0), ("theta", math.nan)]
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ArgumentError, match=name):
        StripeRouter(**{name: value})


@pytest.mark.parametrize("entries", [1 << 20, 70])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local": 3},
        {"init": 0},
        {"init": 2, "official": True},
        {"step": 3, "init": 3, "local": 2, "each": True},
    ],
)
def test_anchors_are_the_largest_logits_over_what_is_near(options, entries, monkeypatch):
    monkeypatch.setattr("foveate.routing.stripes._ENTRIES", entries)
    router = StripeRouter(**({"block": 4, "step": 2} | options))
    for n, heads in ((1, 2), (5, 4), (8, 2), (50, 4)):
        q, k = torch.randn(2, heads, n, 6), torch.randn(2, 2, n, 6)
        logits = 0.3 * q @ k.repeat_interleave(heads // 2, 1).transpose(-1, -2)
        expected = logits.masked_fill(~router.near(n).dense(), float("-inf")).amax(-1)
        torch.testing.assert_close(router.anchors(q, k, 0.3), expected)
