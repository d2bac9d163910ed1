import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.pairs import Pairs
from tests.scores.blocks import B, H, dense_and_cells, gradients


@pytest.mark.parametrize("shape", [(B, H, 5, 6), (H, 5, 6), (5, 6), (5, 1), (1, 6), (B, 1, 1, 6)])
@pytest.mark.parametrize("per_head", [False, True])
def test_bias_adds_a_broadcast_map(shape, per_head):
    bias = torch.randn(shape, dtype=torch.float64)
    want, got = dense_and_cells(Bias(bias), 5, 6, per_head=per_head)
    assert torch.equal(want, got)


def test_bias_equals_a_float_mask():
    q, k, v, bias = (
        torch.randn(2, 2, 4, 3),
        torch.randn(2, 2, 5, 3),
        torch.randn(2, 2, 5, 3),
        torch.randn(4, 5),
    )
    a = attend(q, k, v, score=Bias(bias), backend="reference")
    torch.testing.assert_close(a, attend(q, k, v, mask=bias, backend="reference"))


@pytest.mark.parametrize("shape", [(B, H, 6), (1, H, 6), (B, 1, 6), (6,)])
@pytest.mark.parametrize("per_head", [False, True])
def test_key_bias_adds_to_columns(shape, per_head):
    b = torch.randn(shape, dtype=torch.float64)
    want, got = dense_and_cells(KeyBias(b), 5, 6, per_head=per_head)
    assert torch.equal(want, got)
    assert torch.equal(
        KeyBias(b).values(Pairs.full(5, 6)).expand(B, H, 5, 6),
        b.expand(B, H, 6)[:, :, None].expand(-1, -1, 5, -1),
    )


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("lead", [(B, H), (1, H), (1, 1)])
@pytest.mark.parametrize("per_head", [False, True])
def test_gathered_reads_the_row_of_its_side(side, lead, per_head):
    grid, n = Grid(2, 3), 6
    u = torch.randn(*lead, n, 5, dtype=torch.float64)
    score = Gathered(u, lambda q, k: k[1] - q[1] + 2, side=side, grid=grid)
    want, got = dense_and_cells(score, n, n, per_head=per_head)
    assert torch.equal(want, got)
    values = score.values(Pairs.full(n, n)).expand(*lead, n, n)
    for q in range(n):
        for k in range(n):
            row = q if side == "query" else k
            assert torch.equal(values[..., q, k], u[..., row, k % 3 - q % 3 + 2])


@pytest.mark.parametrize("per_head", [False, True])
def test_gathered_at_a_key_coordinate(per_head):
    u = torch.randn(B, H, 4, 3, dtype=torch.float64)
    score = Gathered(u, lambda q, k: k[1], grid=Grid(2, 3))
    # Queries are on no grid here: only key coordinates are used.
    score_1d = Gathered(u, lambda q, k: k[0] % 3)
    want, got = dense_and_cells(score_1d, 4, 6, per_head=per_head)
    assert torch.equal(want, got)
    assert torch.equal(score.values(Pairs.full(4, 6)), u[..., [0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("per_head", [False, True])
def test_clipped_indices_read_the_first_and_last_entry(side, per_head):
    grid, n = Grid(2, 3), 6
    u = torch.randn(B, H, n, 3, dtype=torch.float64)
    score = Gathered(u, lambda q, k: k[1] - q[1] + 1, side=side, grid=grid, clip=True)
    want, got = dense_and_cells(score, n, n, per_head=per_head)
    assert torch.equal(want, got)
    inside = Gathered(u, lambda q, k: (k[1] - q[1] + 1).clamp(0, 2), side=side, grid=grid)
    assert torch.equal(score.values(Pairs.full(n, n)), inside.values(Pairs.full(n, n)))


def test_gathered_reproduces_decomposed_relative_positions():
    grid, q = Grid(3, 4), torch.randn(1, 2, 12, 5)
    ty, tx = torch.randn(5, 5), torch.randn(7, 5)
    score = Gathered(q @ ty.T, lambda q, k: k[0] - q[0] + 2, grid=grid)
    score = score + Gathered(q @ tx.T, lambda q, k: k[1] - q[1] + 3, grid=grid)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    bias = (q[:, :, :, None] * ty[y[None] - y[:, None] + 2]).sum(-1)
    bias = bias + (q[:, :, :, None] * tx[x[None] - x[:, None] + 3]).sum(-1)
    got = attend(q, q, q, score=score, backend="reference")
    torch.testing.assert_close(got, attend(q, q, q, mask=bias, backend="reference"))


def test_gathered_with_queries_on_a_grid_of_their_own():
    grid, asks = Grid(4, 6), Grid(2, 3)
    u = torch.randn(1, H, 6, 11, dtype=torch.float64)
    score = Gathered(u, lambda q, k: k[1] - 2 * q[1] + 5, grid=grid, query_grid=asks)
    want, got = dense_and_cells(score, 6, 24, per_head=True)
    assert torch.equal(want, got)
    qx, kx = torch.arange(6) % 3, torch.arange(24) % 6
    index = (kx[None] - 2 * qx[:, None] + 5).expand(1, H, 6, 24)
    assert torch.equal(score.values(Pairs.full(6, 24)), u.gather(-1, index))
    q, k = torch.randn(1, H, 6, 4), torch.randn(1, H, 24, 4)
    score = Gathered(u.float(), score.f, grid=grid, query_grid=asks)
    torch.testing.assert_close(
        attend(q, k, k, score=score), attend(q, k, k, score=score, backend="reference")
    )


def test_gradients():
    bias, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert gradients(lambda bias, b: {"score": [Bias(bias), KeyBias(b)]}, bias, b)
    u, w = (torch.randn(1, 2, n, 6, dtype=torch.float64) for n in (3, 4))
    index = lambda q, k: k[0] - q[0] + 2  # noqa: E731
    assert gradients(lambda u, w: {"score": [Gathered(u, index), Gathered(w, index, side="key")]}, u, w)


def test_bad_shapes_are_named():
    q = torch.randn(2, 3, 4, 2)
    with pytest.raises(ArgumentError, match=r"score: Bias.bias.*broadcasts to"):
        attend(q, q, q, score=Bias(torch.ones(3, 5)))
    with pytest.raises(ArgumentError, match=r"score: KeyBias.b"):
        attend(q, q, q, score=KeyBias(torch.ones(5)))
    with pytest.raises(ArgumentError, match=r"score: Gathered.U.*N_q = 4"):
        attend(q, q, q, score=Gathered(torch.ones(1, 1, 3, 2), lambda q, k: k[0]))
    with pytest.raises(ArgumentError, match=r"score: Gathered.U.*R >= 1"):
        attend(q, q, q, score=Gathered(torch.ones(1, 1, 4, 0), lambda q, k: k[0], clip=True))
    with pytest.raises(ArgumentError, match=r"Gathered.side"):
        Gathered(torch.ones(1, 1, 3, 2), lambda q, k: k[0], side="both")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^score: .*meta"):
        attend(q, q, q, score=KeyBias(torch.ones(4, device="meta")))


def test_repr_is_readable():
    def offset(q, k):
        return k[0]

    shown = repr(Gathered(torch.ones(1, 1, 3, 2), offset, side="key"))
    assert shown == "Gathered(U=Tensor(1, 1, 3, 2), f=offset, side='key')"
