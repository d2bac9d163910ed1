"""Anchors on a power law and the spans behind them, against plain numbers."""

import math
from itertools import pairwise

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing import spans as routing_spans
from foveate.routing.spans import ABSENT, Spans, Stripe, search_spans, select_spans


def plain(q, k, t, stripe, count, present=None):
    """Spans of one query of one head: (start, end, score), best first, the farthest first among equals."""
    first = 0 if present is None else present.tolist().index(True)
    power = 1 / stripe.search_power
    found = []
    i = stripe.index + 1
    while math.floor(i**power + 1e-9) <= t + 1:
        a = t + 1 - math.floor(i**power + 1e-9)
        if present is None or present[a]:
            found.append((float(q @ k[a]), -a, a))
        i += 1
    found.sort(key=lambda x: (-x[0], -x[1]))
    spans = []
    length = max(t + 1 - first, 0) ** stripe.span_power
    for score, _, a in found[:count]:
        start = max(a - math.ceil(stripe.backward * length), first, 0)
        spans.append((start, min(a + math.ceil(stripe.forward * length), t - stripe.window), score))
    return spans + [(-1, -1, ABSENT)] * (count - len(spans))


STRIPES = [
    Stripe(index=1),
    Stripe(index=0, forward=1.0),
    Stripe(index=2, search_power=1 / 3, backward=1.5, forward=0.7),
    Stripe(index=1, search_power=0.55, span_power=0.6),
    Stripe(index=2, search_power=0.55, forward=0.5, official=True),
]


@pytest.mark.parametrize("stripe", STRIPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_q", [40, 3])
def test_equal_to_searching_one_query_at_a_time(stripe, padded, n_q):
    q, k = torch.randn(2, 4, n_q, 4, dtype=torch.float64), torch.randn(2, 2, 40, 4, dtype=torch.float64)
    present = None
    if padded:
        present = torch.ones(2, 40, dtype=torch.bool)
        present[0, :5] = False
        present[1, 20] = False
    found = search_spans(q, k, stripe, spans=3, present=present)
    for b in range(2):
        for h in range(4):
            for i in range(n_q):
                mask = None if present is None else present[b]
                wanted = plain(q[b, h, i], k[b, h // 2], 40 - n_q + i, stripe, 3, mask)
                got = zip(*(x[b, h, i].tolist() for x in found), strict=True)
                for (s, e, x), (start, end, score) in zip(wanted, got, strict=True):
                    assert (start, end) == (s, e), (b, h, i)
                    assert score == pytest.approx(x)


def test_the_farthest_of_equal_anchors_comes_first():
    q, k = torch.ones(1, 1, 50, 2), torch.ones(1, 1, 50, 2)
    stripe = Stripe(index=1)
    end = search_spans(q, k, stripe, spans=2).end[0, 0, 49]
    assert end.tolist() == [50 - 49, 50 - 36]


def test_anchors_are_distinct_and_outside_the_window():
    for stripe in STRIPES:
        anchors = search_spans(torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4), stripe, spans=3)
        at = torch.arange(300)[:, None]
        assert (anchors.end <= (at - stripe.window).clamp(min=-1)).all()
        assert all(a < b for a, b in pairwise(stripe.distances(10**4)))
        assert stripe.distances(10**4)[0] == stripe.window + 1


@pytest.mark.parametrize("n", [10, 99, 100, 1000, 4321])
def test_candidate_spans_and_window_cover_every_position(n):
    stripe = Stripe(index=1, backward=2.0)
    seen = torch.zeros(n, dtype=torch.bool)
    seen[max(n - stripe.window, 0) :] = True
    for distance in stripe.distances(n):
        a = n - distance
        seen[max(a - math.ceil(2 * math.sqrt(n)), 0) : a + 1] = True
    assert seen.all()


def test_windows_are_powers_less_one_even_where_roots_round():
    assert [Stripe(index=i).window for i in (0, 1, 3)] == [0, 3, 15]
    assert [Stripe(index=i, search_power=1 / 3).window for i in (1, 4)] == [7, 124]
    # 4^2.5 is 32; single precision says 31.99999.
    assert Stripe(index=1, search_power=0.4).distances(40) == [5, 15, 32]
    assert Stripe(index=1, search_power=0.4, official=True).distances(40)[:2] == [5, 15]


def test_gates_are_shares():
    found = search_spans(torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4), Stripe(index=1), spans=2)
    gates = found.gates()
    torch.testing.assert_close(gates.sum(-1), torch.ones(1, 1, 30))
    # No anchor, one anchor, several.
    assert gates[0, 0, 2].tolist() == [0.5, 0.5]
    assert gates[0, 0, 4].tolist() == [1.0, 0.0]
    assert (gates[0, 0, 20] > 0).all()


def test_only_scores_have_gradients_and_only_of_anchors():
    q = torch.randn(1, 1, 30, 4, requires_grad=True)
    k = torch.randn(1, 1, 30, 4, requires_grad=True)
    found = search_spans(q, k, Stripe(index=1), spans=2)
    assert not found.start.is_floating_point()
    assert not found.end.is_floating_point()
    found.score[0, 0, 29].sum().backward()
    assert k.grad is not None
    anchors = found.end[0, 0, 29]
    assert set(k.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist()) == set(anchors.tolist())


def test_selection_holds_exactly_the_spans():
    for stripe in STRIPES:
        q, k = torch.randn(2, 2, 37, 4), torch.randn(2, 2, 50, 4)
        found = search_spans(q, k, stripe, spans=2)
        where = select_spans(found, 50, stripe)
        where.schedule.validate()
        keys = torch.arange(50)
        start, end = (x.transpose(2, 3).flatten(1, 2)[..., None] for x in (found.start, found.end))
        assert where.dense().equal((keys >= start) & (keys <= end) & (start >= 0))


def spans_from(start, n_k, length):
    """Spans of given starts, -1 for none."""
    end = torch.where(start < 0, -1, (start + length).clamp(max=n_k - 1))
    return Spans(start, end, torch.zeros(start.shape))


@pytest.mark.parametrize("kind", ["one", "two", "none", "any"])
def test_queries_that_share_cells_see_their_own_spans_and_no_more(kind):
    n, stripe = 256, Stripe(index=1)
    start = {
        # All in one bucket, which takes several cells; two queries far from the others; hardly any span at all.
        "one": torch.full((2, 1, n, 2), 100),
        "two": torch.full((2, 1, n, 2), 3).index_fill(2, torch.tensor([70, 200]), 239),
        "none": torch.full((2, 1, n, 2), -1).index_fill(2, torch.tensor([255]), 17),
        "any": torch.randint(-1, n, (2, 1, n, 2)),
    }[kind]
    found = spans_from(start, n, 20)
    where = select_spans(found, n, stripe)
    where.schedule.validate()
    assert where.cells[0].q_ids.shape[3] > 1
    first, last = (x.transpose(2, 3).flatten(1, 2)[..., None] for x in (found.start, found.end))
    keys = torch.arange(n)
    assert where.dense().equal((keys >= first) & (keys <= last) & (first >= 0))
    # Wherever spans begin: no more cells than whole ones and one more per bucket.
    assert where.cells[0].q_ids.shape[2] <= n // 64 + n // 16


@pytest.mark.parametrize("heads", [1, 2])
def test_slices_and_gathered_rows_score_alike(heads, monkeypatch):
    q, k = torch.randn(2, 2, 150, 4, dtype=torch.float64), torch.randn(2, heads, 170, 4, dtype=torch.float64)
    present = torch.rand(2, 170) > 0.2
    for stripe in STRIPES:
        found = []
        for least, piece in ((1, 1 << 18), (1, 64), (1000, 1 << 18)):
            monkeypatch.setattr(routing_spans, "_SLICED", least)
            monkeypatch.setattr(routing_spans, "_TEMPORARY", piece)
            found.append(search_spans(q, k, stripe, spans=3, present=present))
        for other in found[1:]:
            assert found[0].start.equal(other.start)
            assert found[0].end.equal(other.end)


def test_pairs_grow_like_the_power_three_halves():
    counts = []
    for n in (1024, 4096, 16384):
        stripe = Stripe(index=1)
        q = torch.randn(1, 1, n, 2)
        schedule = select_spans(search_spans(q, q, stripe, spans=2), n, stripe).schedule
        assert schedule.pairs_needed <= 2 * n * 2 * math.sqrt(n)
        # Spans that share a cell are computed for all queries of it, and its keys are read once for all of them.
        assert schedule.pairs_computed <= 5.5 * schedule.pairs_needed
        assert 9 * sum(g.n_cells * g.tk for g in schedule.groups) <= schedule.pairs_needed
        counts.append(schedule.pairs_needed)
    for a, b in pairwise(counts):
        assert math.log(b / a, 4) == pytest.approx(1.5, abs=0.1)
    candidates = [sum(len(Stripe(index=1).distances(t)) for t in range(1, n + 1)) for n in (1024, 4096)]
    assert math.log(candidates[1] / candidates[0], 4) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"index": -1}, "index"),
        ({"search_power": 1.0}, "search_power"),
        ({"span_power": 0.0}, "span_power"),
        ({"backward": -1.0}, "backward"),
        ({"forward": math.nan}, "forward"),
    ],
)
def test_bad_stripes_are_named(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        Stripe(**options)


def test_bad_arguments_are_named():
    q = torch.zeros(1, 2, 8, 4)
    with pytest.raises(ArgumentError, match=r"^spans:"):
        search_spans(q, q, Stripe(), spans=0)
    with pytest.raises(ArgumentError, match=r"^q:"):
        search_spans(q, q[:, :, :4], Stripe(), spans=1)
    with pytest.raises(ArgumentError, match=r"^k:"):
        search_spans(q, torch.zeros(1, 3, 8, 4), Stripe(), spans=1)
