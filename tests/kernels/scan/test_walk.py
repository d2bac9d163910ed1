"""Reading a map along paths and putting the result back, in values and gradients."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.scan import along, put_back, scan
from foveate.patterns.paths import both_ways, cross, diagonal, polyline, raster, snake, spiral

GRID = Grid(4, 5)
PATHS = both_ways(snake(GRID), diagonal(GRID), spiral(GRID), polyline(GRID))


def test_tokens_come_in_the_order_of_each_path_and_go_back():
    x = torch.randn(2, 20, 3)
    seen = along(x, PATHS)
    for p, path in enumerate(PATHS):
        assert torch.equal(seen[:, p], x[:, path.order])
    assert torch.equal(put_back(seen, PATHS), x.unsqueeze(1).expand(-1, 8, -1, -1))


def test_every_path_may_read_a_sequence_of_its_own():
    x = torch.randn(2, 8, 20, 3)
    for p, path in enumerate(PATHS):
        assert torch.equal(along(x, PATHS)[:, p], x[:, p, path.order])


def test_gradients_of_any_order():
    x = torch.randn(1, 20, 2, dtype=torch.float64, requires_grad=True)

    def call(x):
        return put_back(along(x, PATHS).sin().cumsum(2), PATHS)

    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_vmap():
    x = torch.randn(3, 20, 2)
    single = torch.func.vmap(lambda y: along(y[None], PATHS)[0])(x)
    assert torch.equal(single, along(x, PATHS))
    grads = torch.func.vmap(torch.func.grad(lambda y: along(y[None], PATHS).cumsum(2).sum()))(x)
    x.requires_grad_()
    along(x, PATHS).cumsum(2).sum().backward()
    torch.testing.assert_close(grads, x.grad)


def test_compiles_whole():
    x = torch.randn(2, 20, 3)

    def call(x):
        return put_back(along(x, cross(GRID)) * 2, cross(GRID)).sum(1)

    torch._dynamo.reset()
    paths = cross(GRID)
    compiled = torch.compile(
        lambda x: put_back(along(x, paths) * 2, paths).sum(1), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), call(x))


def test_one_scan_serves_all_directions():
    q, k, v = (torch.randn(2, 20, 4, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(2, 20, 1, dtype=torch.float64)
    paths = cross(GRID)
    together = put_back(scan(*(along(x, paths) for x in (q, k, v)), decay=along(decay, paths)), paths)
    for p, path in enumerate(paths):
        alone = scan(*(x[:, None, path.order] for x in (q, k, v)), decay=decay[:, None, path.order])
        torch.testing.assert_close(together[:, p], alone[:, 0, path.inverse])
    there = scan(q[:, None], k[:, None], v[:, None], decay=decay[:, None, :, 0])
    torch.testing.assert_close(together[:, :1], there)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: along(torch.randn(20, 3), PATHS), r"^x: expected \(batch, tokens"),
        (lambda: along(torch.randn(2, 7, 20, 3), PATHS), r"^x: expected \(batch, tokens"),
        (lambda: along(torch.randn(1, 19, 3), PATHS), "^x: expected 20 tokens"),
        (lambda: put_back(torch.randn(1, 7, 20, 3), PATHS), "^y: expected 4 axes"),
        (lambda: put_back(torch.randn(1, 8, 21, 3), PATHS), "^y: expected 20 tokens"),
        (lambda: along(torch.randn(1, 20, 3), [raster(GRID), raster(Grid(20))]), "^paths: expected"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
