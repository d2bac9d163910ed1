import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, Explicit, SlidingWindow
from foveate.patterns.grids import Halo, Neighborhood, Windows
from foveate.patterns.schedule import Mean, Schedule, Weights
from foveate.patterns.selection import Selection
from foveate.scores.after import Add, Multiply
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Exp, ReLU, Sigmoid, Softmax
from foveate.scores.temperature import RowFactor, SoftCap

RULES = [Softmax(), Softmax(sink=0.5), Sigmoid(-1.0), ReLU(), Exp()]


def ref(q, k, v, **options):
    return attend(q, k, v, backend="reference", **options)


def rows(n, *, b=2, h=2, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, dtype=torch.float64, generator=g) for _ in range(3)]


def brute(q, k, v, ids, rule, f=lambda x, q, k: x):
    """One query row over a list of key ids, in Python floats."""
    logits = [f(float(q @ k[j]) / math.sqrt(len(q)), q, k[j]) for j in ids]
    weights, _ = rule.weights(torch.tensor(logits, dtype=torch.float64).reshape(1, 1, 1, -1))
    return sum((w * v[j] for w, j in zip(weights[0, 0, 0], ids, strict=True)), torch.zeros_like(v[0]))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(
    "where",
    [SlidingWindow(2, 1), Neighborhood(Grid(3, 4), 3), Windows(Grid(3, 4), (3, 2)), ~Causal()],
    ids=lambda p: type(p).__name__,
)
def test_patterns_equal_a_loop(where, rule):
    q, k, v = rows(12)
    out = ref(q, k, v, where=where, weigh=rule)
    dense = where.dense(12)
    for b in range(2):
        for i in range(12):
            ids = dense[i].nonzero().flatten().tolist()
            torch.testing.assert_close(out[b, 1, i], brute(q[b, 1, i], k[b, 1], v[b, 1], ids, rule))


@given(seed=st.integers(0, 99), leading=st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)]))
def test_cells_equal_an_explicit_combination(seed, leading):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, high: torch.randint(-1, high, shape, generator=g)  # noqa: E731
    q, k, v = rows(5, seed=seed)
    cells, tq, tk = 3, 2, 4
    q_ids = torch.stack([torch.randperm(5, generator=g)[:tq] for _ in range(leading[0] * leading[1] * cells)])
    q_ids = q_ids.reshape(*leading, cells, tq)
    q_ids[draw(*q_ids.shape, high=3) < 0] = -1
    k_ids = torch.stack([torch.randperm(5, generator=g)[:tk] for _ in range(leading[0] * leading[1] * cells)])
    k_ids = k_ids.reshape(*leading, cells, tk)
    k_ids[draw(*k_ids.shape, high=3) < 0] = -1
    mask = torch.rand(*leading, cells, tq, tk, generator=g) < 0.7
    factor = torch.randn(2, 2, cells, tq, dtype=torch.float64, generator=g)
    for rule in (Softmax(), Sigmoid(0.5)):
        for combine in ("sum", Mean(0.01), Weights(factor)):
            where = Selection(q_ids, k_ids, mask, n_q=5, n_k=5, combine=combine)
            out = ref(q, k, v, where=where, weigh=rule)
            want, count = torch.zeros_like(out), torch.zeros(2, 2, 5)
            for b in range(2):
                for h in range(2):
                    at = (b % leading[0], h % leading[1])
                    for c in range(cells):
                        for t, i in enumerate(q_ids[at][c].tolist()):
                            if i < 0:
                                continue
                            ids = k_ids[at][c][mask[at][c, t] & (k_ids[at][c] >= 0)].tolist()
                            row = brute(q[b, h, i], k[b, h], v[b, h], ids, rule) if ids else 0.0
                            want[b, h, i] += row * (
                                factor[b, h, c, t] if isinstance(combine, Weights) else 1.0
                            )
                            count[b, h, i] += 1
            if isinstance(combine, Mean):
                want = want / (count + 0.01).unsqueeze(-1)
            torch.testing.assert_close(out, want)


def test_disjoint_cells_are_one_softmax():
    q, k, v = rows(6)
    ids = torch.arange(6).reshape(1, 1, 1, 6).expand(1, 1, 2, 6)
    halves = torch.arange(6).reshape(1, 1, 2, 3)
    where = Selection(ids, halves, n_q=6, n_k=6)
    for rule in RULES:
        torch.testing.assert_close(ref(q, k, v, where=where, weigh=rule), ref(q, k, v, weigh=rule))
    schedule = Schedule(6, 6, where.schedule.groups)
    torch.testing.assert_close(ref(q, k, v, where=schedule), ref(q, k, v))


def test_per_cell_stages_see_the_right_pairs():
    """Scores, masks and after-values on overlapping cells equal the same values on one-cell calls."""
    q, k, v = rows(6, b=2, h=2)
    g = torch.Generator().manual_seed(1)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)  # noqa: E731
    options = {
        "score": [
            RowFactor(make(2, 2, 6)),
            RelativeTable(make(2, 3, 5), Grid(2, 3)),
            Gathered(make(2, 1, 6, 3), lambda q, k: k[1], grid=Grid(2, 3)),
            KeyBias(make(2, 1, 6)),
            Bias(make(2, 6, 6)),
            SoftCap(3.0),
        ],
        "mask": make(2, 1, 6, 6),
        "after": [Multiply(make(2, 2, 6, 6)), Add(make(6, 6))],
    }
    cells = [([0, 1, 4], [0, 2, 3]), ([4, 5, 0], [1, 3, 5])]
    ids = [torch.tensor([c[i] for c in cells]).reshape(1, 1, 2, 3) for i in (0, 1)]
    where = Selection(ids[0], ids[1], n_q=6, n_k=6, combine="sum")
    want = 0
    for q_ids, k_ids in cells:
        dense = torch.zeros(6, 6, dtype=torch.bool)
        for i in q_ids:
            dense[i, k_ids] = True
        want = want + ref(q, k, v, where=Explicit(dense), **options)
    torch.testing.assert_close(ref(q, k, v, where=where, **options), want)


@pytest.mark.parametrize("combine", ["lse", "sum", Mean(0.1)], ids=repr)
def test_gradients_through_cells(combine):
    q, k, v = (x.requires_grad_(True) for x in rows(4, b=1, h=1, d=2))
    ids = torch.tensor([[0, 1, -1], [2, 3, 0]]).reshape(1, 1, 2, 3)
    keys = torch.tensor([[0, 1], [2, 3]]).reshape(1, 1, 2, 2)
    where = Selection(ids, keys, n_q=4, n_k=4, combine=combine)
    f = lambda q, k, v: ref(q, k, v, where=where)  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, k, v))
    assert torch.autograd.gradgradcheck(f, (q, k, v))


def test_gradients_of_the_weights_of_cells():
    q, k, v = rows(4, b=1, h=1, d=2)
    ids = torch.tensor([[0, 1], [1, 3]]).reshape(1, 1, 2, 2)
    w = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)

    def f(w):
        return ref(q, k, v, where=Selection(ids, ids, n_q=4, n_k=4, combine=Weights(w)))

    assert torch.autograd.gradcheck(f, (w,))


@pytest.mark.parametrize("where", [None, Causal(), SlidingWindow(1)], ids=repr)
def test_gradients_of_output_and_lse(where):
    q, k, v = (x.requires_grad_(True) for x in rows(4, b=1, h=2, d=2))
    mask = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, mask):
        return ref(q, k[:, :1], v[:, :1], where=where, mask=mask, return_lse=True)

    assert torch.autograd.gradcheck(f, (q, k, v, mask))
    assert torch.autograd.gradgradcheck(f, (q, k, v, mask))


def test_phantom_keys_count_in_the_denominator():
    """A zero border equals padding k and v by hand, relative positions included."""
    grid, block = Grid(4, 4), 2
    q, k, v = rows(16, h=2)
    table = torch.randn(2, 7, 7, dtype=torch.float64)
    where = Halo(grid, block, 1, border="zero")
    out = ref(q, k, v, where=where, score=RelativeTable(table, grid))
    pad = lambda x: torch.nn.functional.pad(x.reshape(2, 2, 4, 4, 3), (0, 0, 1, 1, 1, 1))  # noqa: E731
    k6, v6 = pad(k), pad(v)
    for y in range(4):
        for x in range(4):
            y0, x0 = y // 2 * 2, x // 2 * 2
            ks = k6[:, :, y0 : y0 + 4, x0 : x0 + 4].reshape(2, 2, 16, 3)
            vs = v6[:, :, y0 : y0 + 4, x0 : x0 + 4].reshape(2, 2, 16, 3)
            ys, xs = torch.arange(16) // 4 + y0 - 1 - y + 3, torch.arange(16) % 4 + x0 - 1 - x + 3
            row = q[:, :, y * 4 + x][:, :, None]
            logits = row @ ks.mT / 3**0.5 + table[:, ys, xs][None, :, None]
            torch.testing.assert_close(out[:, :, y * 4 + x], (logits.softmax(-1) @ vs)[:, :, 0])


def test_values_of_real_keys_skip_phantoms():
    """Key biases, masks and maps speak about real keys; phantoms have bias 0, are unmasked, keep factor 1."""
    grid, n = Grid(3), 3
    q, k, v = rows(n, b=1, h=1)
    where = Halo(grid, 3, 1, border="zero")
    b, f = torch.randn(n, dtype=torch.float64), torch.randn(n, n, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    out, lse = ref(q, k, v, where=where, score=KeyBias(b), mask=mask, after=Multiply(f), return_lse=True)
    logits = q @ k.mT / 3**0.5 + b
    logits = torch.cat([logits.masked_fill(~mask, -torch.inf), torch.zeros(1, 1, n, 2)], -1)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, logits.softmax(-1)[..., :3] * f @ v)
