import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.scores.pairs import Pairs
from foveate.scores.relative import RelativeTable
from tests.scores.blocks import H, dense_and_cells, gradients


def brute(table, grid, sign, step, clip, lead=0):
    n = grid.numel + lead
    out = torch.zeros(table.shape[0], n, n, dtype=table.dtype)
    coords = grid.coords().tolist()
    half = [s // 2 for s in table.shape[1:]]
    for i, cq in enumerate(coords):
        for j, ck in enumerate(coords):
            offsets = [(b - a) if sign == "key-query" else (a - b) for a, b in zip(cq, ck, strict=True)]
            if clip:
                assert step == 1
                index = [max(-m, min(m, o)) + m for o, m in zip(offsets, half, strict=True)]
            else:
                if any(o % step for o in offsets):
                    continue
                index = [o // step + m for o, m in zip(offsets, half, strict=True)]
                if any(not 0 <= x < s for x, s in zip(index, table.shape[1:], strict=True)):
                    continue
            out[:, i + lead, j + lead] = table[(slice(None), *index)]
    return out


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    m=st.integers(0, 3),
    sign=st.sampled_from(["key-query", "query-key"]),
    step=st.integers(1, 3),
    clip=st.booleans(),
    shared=st.booleans(),
    lead=st.integers(0, 2),
)
def test_equals_a_loop_over_pairs(sizes, m, sign, step, clip, shared, lead):
    grid, step = Grid(*sizes), 1 if clip else step
    table = torch.randn(1 if shared else H, *[2 * m + 1] * grid.ndim, dtype=torch.float64)
    score = RelativeTable(table, grid, sign=sign, step=step, clip=clip, lead=lead)
    want = brute(table, grid, sign, step, clip, lead)
    n = grid.numel + lead
    assert torch.equal(score.values(Pairs.full(n, n))[0], want)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("heads", [1, H])
def test_cells_equal_dense(per_head, heads):
    table = torch.randn(heads, 5, 3, dtype=torch.float64)
    want, got = dense_and_cells(RelativeTable(table, Grid(3, 4)), 12, 12, per_head=per_head)
    assert torch.equal(want, got)


def test_alike_cells_read_the_table_once():
    table = torch.randn(H, 3, 3)
    q = torch.tensor([[[[0, 1], [8, 9]]]])
    k = torch.tensor([[[[0, 5], [8, 13]]]])
    score = RelativeTable(table, Grid(4, 4))
    one = score.values(Pairs(q, k, n_q=16, n_k=16, alike=True))
    each = score.values(Pairs(q, k, n_q=16, n_k=16))
    assert one.shape == (1, H, 1, 2, 2)
    assert torch.equal(one.expand_as(each), each)


def test_swin_index_convention():
    # (yi - yj + M - 1)(2M - 1) + (xi - xj + M - 1) into a ((2M-1)^2, H) table, query i, key j.
    m, h = 3, 2
    flat = torch.randn((2 * m - 1) ** 2, h)
    y, x = torch.arange(9) // 3, torch.arange(9) % 3
    index = (y[:, None] - y[None] + m - 1) * (2 * m - 1) + (x[:, None] - x[None] + m - 1)
    want = flat[index].permute(2, 0, 1)
    table = flat.T.reshape(h, 2 * m - 1, 2 * m - 1)
    assert torch.equal(RelativeTable(table, Grid(3, 3), sign="query-key").values(Pairs.full(9, 9))[0], want)


def test_another_grid_for_the_queries():
    table = torch.arange(7.0)[None]
    score = RelativeTable(table, Grid(4), query_grid=Grid(2))
    assert score.values(Pairs.full(2, 4))[0, 0].tolist() == [[3, 4, 5, 6], [2, 3, 4, 5]]


def test_gradients():
    table = torch.randn(2, 5, dtype=torch.float64)
    assert gradients(lambda t: {"score": RelativeTable(t, Grid(4))}, table, n_q=4)


def test_bad_tables_are_named():
    with pytest.raises(ArgumentError, match=r"RelativeTable.table.*odd.*2 m \+ 1"):
        RelativeTable(torch.ones(2, 4), Grid(4))
    with pytest.raises(ArgumentError, match=r"RelativeTable.table"):
        RelativeTable(torch.ones(2, 5), Grid(4, 4))
    with pytest.raises(ArgumentError, match=r"RelativeTable.sign"):
        RelativeTable(torch.ones(2, 5), Grid(4), sign="minus")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"RelativeTable.step"):
        RelativeTable(torch.ones(2, 5), Grid(4), step=0)
    with pytest.raises(ArgumentError, match=r"RelativeTable.grid"):
        RelativeTable(torch.ones(2, 5), 4)  # type: ignore[arg-type]
    q = torch.randn(1, 2, 6, 2)
    with pytest.raises(ArgumentError, match=r"score: N_q: expected 4 tokens"):
        attend(q, q, q, score=RelativeTable(torch.ones(2, 5), Grid(4)))
    with pytest.raises(ArgumentError, match=r"1 or 2 heads"):
        attend(q, q, q, score=RelativeTable(torch.ones(3, 5), Grid(6)))


def test_repr_shows_what_was_written():
    shown = repr(RelativeTable(torch.ones(2, 5), Grid(4), step=2))
    assert shown == "RelativeTable(table=Tensor(2, 5), grid=Grid(4), step=2)"
