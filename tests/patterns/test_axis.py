"""AxisRule: the closed form of one axis against its definition, its transpose and its intersections."""

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.patterns.axis import AxisRule, LocalAxis
from foveate.patterns.grids import Neighborhood
from tests.patterns.strategies import grid_patterns, grids, halos, sequence_patterns


def neighborhood_keys(i, length, window, dilation, stride, causal):
    """The keys of one position, read off the papers' text with plain integers."""
    group, p = i % dilation, i // dilation
    n = len(range(group, length, dilation))
    if causal:
        leader = min(p // stride * stride + stride - 1, n - 1)
        inside = range(max(leader - (window - 1), 0), p + 1)
    else:
        leader = min(p // stride * stride + stride // 2, n - 1)
        start = leader - window // 2
        # Moved inside, never cut: clamp to the group.
        start = max(0, min(start, n - window))
        inside = range(start, start + window)
    return {group + dilation * t for t in inside}


@st.composite
def axis_arguments(draw):
    length = draw(st.integers(1, 23))
    window = draw(st.integers(1, length))
    return (
        length,
        window,
        draw(st.integers(1, length // window)),
        draw(st.integers(1, window)),
        draw(st.booleans()),
    )


@given(axis_arguments())
def test_neighborhood_is_the_definition(arguments):
    length, window, dilation, stride, causal = arguments
    dense = Neighborhood(length, window, dilation, stride, causal).dense()
    for i in range(length):
        keys = set(dense[i].nonzero().flatten().tolist())
        assert keys == neighborhood_keys(i, length, window, dilation, stride, causal)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 4), st.sampled_from(["mask", "clamp"]))
def test_local_axis_blocks(length, block, halo, border):
    size = min(block + 2 * halo, length) if border == "clamp" else block + 2 * halo
    axis = LocalAxis(size, -halo, group=block, border=border)
    dense = axis.rule(length, length).dense()
    for i in range(length):
        start = i // block * block - halo
        if border == "clamp":
            start = max(0, min(start, length - size))
        want = [start <= j < start + size for j in range(length)]
        assert dense[i].tolist() == want


@st.composite
def rules(draw):
    """A rule from anywhere, with the dense matrix of the pattern it came from."""
    if draw(st.booleans()):
        pattern, n_q, n_k = draw(sequence_patterns()), draw(st.integers(0, 12)), draw(st.integers(0, 12))
        return pattern.axes(n_q, n_k)[0], pattern.dense(n_q, n_k)
    pattern = draw(grid_patterns(draw(grids(max_ndim=1))))
    return pattern.axes()[0], pattern.dense()


@given(rules())
def test_transpose_is_the_transpose(case):
    rule, dense = case
    assert torch.equal(rule.dense(), dense)
    turned = rule.transpose()
    assert (turned.n_q, turned.n_k) == (rule.n_k, rule.n_q)
    assert torch.equal(turned.dense(), dense.T)
    assert torch.equal(turned.transpose().dense(), dense)
    assert turned.pairs == rule.pairs == int(dense.sum())


@given(halos(borders=("zero",)))
def test_transpose_of_a_padded_axis(pattern):
    for rule in pattern.padded().pattern.axes():
        assert torch.equal(rule.transpose().dense(), rule.dense().T)
        assert torch.equal(rule.transpose().transpose().dense(), rule.dense())


def test_transpose_of_a_padded_dilated_axis():
    # Zero borders with dilation: keys are displaced by the padding modulo the step.
    for length, dilation, window in ((7, 2, 3), (11, 3, 3), (5, 4, 3), (9, 2, 5)):
        axis = LocalAxis(window, -(window // 2), dilation=dilation, border="zero")
        rule, (low, high) = axis.padded_rule(length), axis.padding(length)
        assert (low, high) == (dilation * (window // 2),) * 2
        assert torch.equal(rule.count, torch.full((length,), window))
        assert torch.equal(rule.dense()[:, low : low + length], axis.rule(length, length).dense())
        assert torch.equal(rule.transpose().dense(), rule.dense().T)
        assert torch.equal(rule.transpose().transpose().dense(), rule.dense())


@given(grids(max_ndim=1).flatmap(lambda g: st.tuples(grid_patterns(g), grid_patterns(g))))
def test_intersection_of_rules(pair):
    a, b = (p.axes()[0] for p in pair)
    met = a.intersect(b)
    if met is None:
        assert a.step != b.step
        assert 1 not in (a.step, b.step)
        return
    assert torch.equal(met.dense(), a.dense() & b.dense())
    assert torch.equal(met.transpose().dense(), met.dense().T)


@given(rules(), st.data())
def test_keys_of_is_the_union(case, data):
    rule, dense = case
    if rule.n_q:
        some = torch.tensor(data.draw(st.lists(st.integers(0, rule.n_q - 1), max_size=5)), dtype=torch.long)
        assert torch.equal(rule.keys_of(some), dense[some].any(0).nonzero().flatten())


def test_a_million_positions_are_quick():
    started = time.perf_counter()
    rule = Neighborhood(1_000_003, 255, 7, 3).axes()[0]
    turned = rule.transpose()
    assert time.perf_counter() - started < 20  # Seconds for tables of 8 MB; an L x L anything would not fit.
    assert rule.pairs == turned.pairs == 1_000_003 * 255


def test_empty_axes():
    for rule in (AxisRule.full(0, 3), AxisRule.full(3, 0), AxisRule.causal(0, 0, 0)):
        assert rule.pairs == 0
        assert rule.transpose().dense().shape == (rule.n_k, rule.n_q)
