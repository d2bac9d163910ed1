"""Scores as gathered biases: every term read back pair by pair; linear forms proved, everything else refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.grid import Grid
from foveate.kernels.cpu import terms
from foveate.kernels.cpu.linear import Linear, linear_form
from foveate.kernels.cpu.tiling import lowered, reach
from foveate.kernels.problem import Problem
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.specials import with_specials
from foveate.patterns.subsample import Subsampled
from foveate.scores.banks import on_keys
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.distance import ALiBi, DistanceDecay
from foveate.scores.relative import RelativeTable
from foveate.scores.temperature import SoftCap

G = Grid(7, 9)
N = G.numel


def problem(where, n, n_k=None, **options):
    q, k = torch.randn(2, 3, n, 8), torch.randn(2, 3, n_k or n, 8)
    return Problem.of(q, k, k, where=where, **options)


def bias_of(p, term):
    """Return the bias of every pair, as the core reads it."""
    index = term.q_code.long()[:, None] + term.k_code.long() + term.base
    index = index.clamp(0, term.table.shape[2] - 1)
    return term.table[..., index]


def agrees(where, n, n_k=None, **options):
    """Compare all terms, at the pairs the pattern lets through, with what the scores add to logits of 0."""
    p = problem(where, n, n_k, **options)
    cells = lowered(p.where, p.n_q, p.n_k, None)

    def known(slopes=None):
        return reach(cells, slopes)

    assert terms.refuse(p, known) is None
    read = terms.read(p, known)
    total = sum(bias_of(p, term) for term in read.terms)
    want = torch.zeros(2, 3, p.n_q, p.n_k)
    for part in p.score:
        want = part.apply(want, p.all_pairs())
    allowed = p.allowed().expand(want.shape)
    torch.testing.assert_close(total.expand(want.shape)[allowed], want[allowed])
    return read


def table(*sizes, heads=3):
    return torch.randn(heads, *sizes)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sign", ["key-query", "query-key"])
@pytest.mark.parametrize("step", [1, 2, (1, 3)])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (13, 17)])
def test_relative_tables(sizes, step, sign, clip):
    score = RelativeTable(table(*sizes), G, sign, step, clip)
    for where in (Neighborhood(G, (3, 5)), Neighborhood(G, 3, dilation=2), Full()):
        agrees(where, N, score=score)


def test_tables_hold_only_the_offsets_that_occur():
    read = agrees(Neighborhood(Grid(7, 90), 3), 630, score=RelativeTable(table(13, 179), Grid(7, 90)))
    assert read.terms[0].table.shape[2] == 5 * 5
    read = agrees(SlidingWindow(5), 300, score=ALiBi(torch.rand(3)))
    assert read.terms[0].table.shape[2] == 6


def test_tokens_before_the_grid_have_no_bias():
    where = with_specials(Neighborhood(G, 3), 4)
    agrees(where, N + 4, score=RelativeTable(table(5, 5), G, lead=4))
    agrees(where, N + 4, score=DistanceDecay(torch.rand(3), G, lead=4))


def test_other_grids_for_queries_and_keys():
    score = RelativeTable(table(5, 7, heads=1), Grid(4, 6), query_grid=Grid(3, 5))
    agrees(Full(), 15, 24, score=score)


@pytest.mark.parametrize("where", [Causal(), SlidingWindow(4, 2), Full()], ids=repr)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("align", ["end", "start"])
def test_alibi(where, signed, align):
    agrees(where, 20, 33, score=ALiBi(torch.rand(3), signed=signed, align=align))
    agrees(where, 20, score=ALiBi(torch.tensor(0.3), signed=signed, align=align))


@pytest.mark.parametrize("metric", ["manhattan", "euclidean", "squared", "chebyshev"])
def test_distance_decay(metric):
    agrees(Neighborhood(G, 5), N, score=DistanceDecay(torch.rand(3), G, metric))


@pytest.mark.parametrize("shape", [(1,), (N,), (2, 1, N), (2, 3, N), (3, 1)])
def test_key_bias(shape):
    agrees(Neighborhood(G, 3), N, score=KeyBias(torch.randn(shape)))


@pytest.mark.parametrize("shape", [(1,), (N, N), (N, 1), (3, 1, 1), (2, 1, 1, N), (2, 3, N, N)])
def test_bias(shape):
    agrees(Neighborhood(G, 3), N, score=Bias(torch.randn(shape)))


@pytest.mark.parametrize("first", [0, 5])
def test_scores_of_a_range_of_keys(first):
    scores = {
        "table": RelativeTable(table(5, 7), G),
        "other grid": RelativeTable(table(5, 7), Grid(7, 8), query_grid=G),
        "alibi": ALiBi(torch.rand(3)),
        "decay": DistanceDecay(torch.rand(3), G),
        "keys": KeyBias(torch.randn(2, 3, N)),
        "one": KeyBias(torch.randn(3, 1)),
        "map": Bias(torch.randn(2, 3, N, N)),
        "rows": Gathered(torch.randn(2, 3, N, 13), lambda q, k: k[0] - q[0] + 6, grid=G),
    }
    for score in scores.values():
        n = score.grid.numel if isinstance(score, RelativeTable) else N
        read = agrees(Full(), N, first + n + 2, score=on_keys(score, first, n))
        assert len(read.terms) == 1
    p = problem(Full(), N, N + 3, score=on_keys(SoftCap(1.0), 0, N))
    assert terms.refuse(p, lambda: None) == "the core does not know OnKeys"


def test_phantom_keys():
    where = Halo(G, 3, 2, border="zero")
    agrees(where, N, score=RelativeTable(table(5, 5), G, "query-key"))
    agrees(where, N, score=KeyBias(torch.randn(N)) + DistanceDecay(torch.rand(3), G) + KeyBias(torch.ones(1)))


GATHERED = {
    "row offset": (lambda q, k: k[0] - q[0] + 6, 13),
    "column offset, reversed": (lambda q, k: 8 + (q[1] - k[1]), 17),
    "both": (lambda q, k: (k[0] - q[0] + 6) * 17 + k[1] - q[1] + 8, 13 * 17),
    "key coordinate": (lambda q, k: k[1], 9),
    "constant": (lambda q, k: 2, 3),
    "signs": (lambda q, k: -(3 - k[0]) + (+k[1]) * 2 + 3, 30),
}


@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.parametrize("side", ["query", "key"])
def test_gathered(name, side):
    f, rows = GATHERED[name]

    def fit(q, k):
        return f(q, k) + 0 * (q[0] + k[0])

    agrees(Neighborhood(G, 3), N, score=Gathered(torch.randn(1, 3, N, rows), fit, side=side, grid=G))


CLIPPED = {
    "row offset": lambda q, k: k[0] - q[0] + 4,
    "reversed": lambda q, k: 4 - k[1] + q[1],
    "both": lambda q, k: 2 * (k[0] - q[0]) - (k[1] - q[1]) + 6,
    "every second query": lambda q, k: k[1] - 2 * q[1] + 4,
    "slope that is no integer": lambda q, k: 2 * k[0] - 3 * q[0] + 7,
    "key coordinate": lambda q, k: k[0] + 2,
    "query coordinate": lambda q, k: 2 * q[0] - 3 + 0 * k[0],
}
# Keys of windows of 3 and a halo of 2 stand -4..4 away from their queries.
HALO = Halo(G, 3, 2, border="zero")


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_gathered_clipped_with_phantom_keys(stride, rows, side, name):
    where = HALO if stride == 1 else Subsampled(HALO, stride)
    asks = G if stride == 1 else where.query_grid
    u = torch.randn(2, 3, asks.numel if side == "query" else N, rows)
    score = Gathered(u, CLIPPED[name], side=side, grid=G, query_grid=asks, clip=True)
    agrees(where, asks.numel, N, score=score)


def test_tables_are_read_as_they_are_where_no_pair_of_the_pattern_leaves_them():
    grid = Grid(30, 40)
    for stride in (1, 2):
        where = Halo(grid, 4, 2, border="zero")
        where = where if stride == 1 else Subsampled(where, stride)
        asks = Grid(30 // stride, 40 // stride)
        # The farthest a key stands: 5 tokens before or after.
        for axis in range(2):
            u = torch.randn(1, 1, asks.numel, 11)
            f = lambda q, k, axis=axis, s=stride: k[axis] - s * q[axis] + 5  # noqa: E731
            read = agrees(
                where, asks.numel, 1200, score=Gathered(u, f, grid=grid, query_grid=asks, clip=True)
            )
            assert torch.equal(read.terms[0].table, u.flatten(2))
            small = Gathered(u[..., 1:], f, grid=grid, query_grid=asks, clip=True)
            read = agrees(where, asks.numel, 1200, score=small)
            assert read.terms[0].table.shape[2] == asks.numel * (11 if stride == 1 else 10)


def test_without_clip_pairs_that_may_not_attend_count():
    score = Gathered(torch.randn(1, 3, N, 5), lambda q, k: k[0] - q[0] + 2, grid=G)
    p = problem(Neighborhood(G, 3), N, score=score)
    assert "-4..8 of 5 entries; clip=True" in terms.refuse(p, lambda *_: None)


NOT_LINEAR = {
    "product": lambda q, k: q[0] * k[0],
    "clamp": lambda q, k: (k[0] - q[0]).clamp(0, 3),
    "torch": lambda q, k: torch.abs(k[0] - q[0]),
    "abs": lambda q, k: abs(k[0] - q[0]),
    "branch": lambda q, k: k[0] if k[0] > q[0] else q[0],
    "equality": lambda q, k: 1 if k[0] == q[0] else 0,
    "truth": lambda q, k: 1 if k[0] else 0,
    "division": lambda q, k: k[0] // 2,
    "remainder": lambda q, k: k[0] % 2,
    "fraction": lambda q, k: k[0] * 0.5,
    "conversion": lambda q, k: int(k[0]),
    "mask as number": lambda q, k: k[0] + True,
    "tensor": lambda q, k: k[0] + torch.ones(1),
    "lookup": lambda q, k: [1, 2, 3][k[0]],
    "nothing": lambda q, k: None,
    "text": lambda q, k: f"{k[0]}",
    "error": lambda q, k: 1 // 0,
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_proved_linear(name):
    assert linear_form(NOT_LINEAR[name], 2) is None


@given(
    q=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    k=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    constant=st.integers(-9, 9),
)
def test_linear_forms(q, k, constant):
    form = linear_form(lambda x, y: q[0] * x[0] + x[1] * q[1] - (-k[0] * y[0]) - (y[1] * -k[1] - constant), 2)
    assert (form.q, form.k, form.constant) == (q, k, constant)
    sizes = ((3, 4), (5, 2))
    values = [
        q[0] * a + q[1] * b + k[0] * c + k[1] * d + constant
        for a in range(3)
        for b in range(4)
        for c in range(5)
        for d in range(2)
    ]
    assert form.range(*sizes) == (min(values), max(values))


@given(
    q=st.tuples(st.integers(-4, 4), st.integers(-4, 4)),
    k=st.tuples(st.integers(-4, 4), st.integers(-4, 4)),
    ends=st.tuples(*(st.tuples(st.integers(-6, 6), st.integers(0, 5)) for _ in range(2))),
)
def test_range_within_offsets(q, k, ends):
    form, sizes = Linear(q, k, 3), ((3, 4), (5, 2))
    ends = [(low, low + more) for low, more in ends]
    total, some, exact = [3], True, True
    for a, b, s, n_q, n_k, (low, high) in zip(q, k, form.slopes(), *sizes, ends, strict=True):
        pairs = [(i, j) for i in range(n_q) for j in range(n_k) if low <= j - s * i <= high]
        some &= bool(pairs)
        # The bound is met where the form is an offset and every offset occurs.
        exact &= a + s * b == 0 and {low, high} <= {j - s * i for i, j in pairs}
        total = [t + a * i + b * j for t in total for i, j in pairs]
    low, high = form.range_within(*sizes, ends)
    if some:
        assert low <= min(total) <= max(total) <= high
        assert not exact or (low, high) == (min(total), max(total))
    full = form.range(*sizes)
    assert full[0] <= low or not some
    assert high <= full[1] or not some


def test_tables_too_large_are_refused():
    score = RelativeTable(table(1, 1), Grid(9000, 9000))
    q = (1, 3, 81_000_000, 8)
    p = Problem.of(q, q, q, where=SlidingWindow(2), score=score)
    assert "table" in terms.refuse(p, lambda: None)
