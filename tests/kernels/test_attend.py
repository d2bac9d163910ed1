import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.patterns.grids import Halo, Neighborhood
from foveate.patterns.schedule import Mean
from foveate.patterns.segments import Segments
from foveate.patterns.selection import Selection
from foveate.scores.bias import KeyBias
from foveate.scores.relative import RelativeTable


@given(
    b=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    n_q=st.integers(1, 9),
    n_k=st.integers(1, 9),
    d=st.integers(1, 9),
    d_v=st.integers(1, 9),
    masked=st.sampled_from([None, torch.bool, torch.float32]),
)
def test_without_extras_it_is_sdpa(b, kv_heads, share, n_q, n_k, d, d_v, masked):
    q = torch.randn(b, kv_heads * share, n_q, d)
    k, v = torch.randn(b, kv_heads, n_k, d), torch.randn(b, kv_heads, n_k, d_v)
    mask = None
    if masked is torch.bool:
        mask = torch.rand(b, 1, n_q, n_k) < 0.7
        mask[..., 0] = True
    elif masked is not None:
        mask = torch.randn(n_q, n_k)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for backend in ("auto", "reference"):
        torch.testing.assert_close(attend(q, k, v, mask=mask, backend=backend), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_causal_alignments(backend):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    want = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(attend(q, k, k, where=Causal("start"), backend=backend), want)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    want = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, k, where=Causal(), backend=backend), want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 0, 5), (2, 3, 5, 0), (0, 3, 4, 5), (2, 3, 0, 0), (1, 1, 1, 1), (2, 0, 4, 4)]
)
def test_empty_and_single_sizes(shape, backend):
    b, h, n_q, n_k = shape
    q, k, v = torch.randn(b, h, n_q, 4), torch.randn(b, h, n_k, 4), torch.randn(b, h, n_k, 3)
    q.requires_grad_(True)
    out, lse = attend(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (b, h, n_q, 3)
    assert lse.shape == (b, h, n_q)
    if n_k == 0:
        assert (out == 0).all()
        assert (lse == float("-inf")).all()
    if n_k == 1:
        torch.testing.assert_close(out, v.expand_as(out))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_batch_of_one_broadcasts(backend):
    q, k = torch.randn(3, 2, 4, 5), torch.randn(1, 2, 6, 5)
    want = F.scaled_dot_product_attention(q, k.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))
    torch.testing.assert_close(attend(q, k, k, backend=backend), want)
    assert attend(k, k, q[:, :, :1].expand(-1, -1, 6, -1), backend=backend).shape == (3, 2, 6, 5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_without_keys_give_zeros_and_no_gradient(backend):
    q, k, v = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    for m in (mask, torch.zeros(4, 4).masked_fill(~mask, float("-inf"))):
        out, lse = attend(q, k, v, mask=m, return_lse=True, backend=backend)
        assert (out[:, :, 1] == 0).all()
        assert (lse[:, :, 1] == float("-inf")).all()
        grads = torch.autograd.grad(out.square().sum() + lse[:, :, [0, 2, 3]].sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert (grads[0][:, :, 1] == 0).all()


def test_lse_is_natural_and_accumulated():
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.bfloat16), torch.randn(2, 2, 6, 8, dtype=torch.bfloat16)
    out, lse = attend(q, k, k, scale=0.3, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    want = (q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_error_budget(dtype, backend):
    grid = Grid(8, 8)
    where = Neighborhood(grid, 5)
    exact = [torch.randn(2, 3, 64, 16, dtype=torch.float64) for _ in range(3)]
    low = [x.to(dtype).requires_grad_(True) for x in exact]
    high = [x.detach().double().requires_grad_(True) for x in low]

    def plain(q, k, v):
        logits = (q @ k.mT) * q.shape[-1] ** -0.5
        return logits.masked_fill(~where.dense(), float("-inf")).softmax(-1) @ v

    up = torch.randn(2, 3, 64, 16, dtype=torch.float64)

    def outcome(f, inputs):
        out = f(*inputs)
        grads = torch.autograd.grad(out, inputs, up.to(out.dtype))
        return [out.detach().double(), *(g.double() for g in grads)]

    truth = outcome(plain, high)
    mine = outcome(lambda q, k, v: attend(q, k, v, where=where, backend=backend), low)
    theirs = outcome(plain, low)
    for i, (t, a, b) in enumerate(zip(truth, mine, theirs, strict=True)):
        assert (a - t).abs().max() <= (2 if i == 0 else 3) * (b - t).abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_does_as_sdpa(backend):
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    b = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        want = F.scaled_dot_product_attention(q, q, q)
        got = attend(q, q, q, backend=backend)
        biased = attend(q, q, q, score=KeyBias(b), where=SlidingWindow(3), backend=backend)
        double = attend(q.double(), q.double(), q.double(), backend=backend)
        mixed = attend(q, q.bfloat16(), q.half(), backend=backend)
    assert got.dtype == want.dtype == biased.dtype == mixed.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    biased.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert b.grad is not None


def test_packed_sequences_attend_within_themselves():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2]])
    q = torch.randn(2, 3, 6, 4)
    for where, causal in ((Segments(ids), False), (Segments(ids) & Causal(), True)):
        out = attend(q, q, q, where=where)
        for b, s in ((0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 6))):
            x = q[b : b + 1, :, s]
            want = F.scaled_dot_product_attention(x, x, x, is_causal=causal)
            torch.testing.assert_close(out[b : b + 1, :, s], want)
        assert (out[0, :, 5] == 0).all()


COMPILED = {
    "plain": {},
    "causal": {"where": Causal()},
    "grid": {"where": Neighborhood(Grid(4, 4), 3)},
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_graph_breaks(name, backend):
    torch._dynamo.reset()
    options, table = COMPILED[name], torch.randn(2, 7, 7, requires_grad=True)

    def f(q, mask):
        score = RelativeTable(table, Grid(4, 4))
        return attend(q, q, q, score=score, mask=mask, return_lse=True, backend=backend, **options)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 16, 4, requires_grad=True)
    mask = torch.randn(16, 16)
    for a, b in zip(compiled(q, mask), f(q, mask), strict=True):
        torch.testing.assert_close(a, b)
    got = torch.autograd.grad(compiled(q, mask)[0].square().sum(), (q, table))
    want = torch.autograd.grad(f(q, mask)[0].square().sum(), (q, table))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_of_the_reference():
    q, mask = torch.randn(3, 1, 2, 16, 4), torch.randn(3, 16, 16)
    table = torch.randn(3, 2, 7, 7)

    def f(q, mask, table):
        score = [RelativeTable(table, Grid(4, 4)), KeyBias(mask[0])]
        where = Neighborhood(Grid(4, 4), 3)
        return attend(q, q, q, where=where, score=score, mask=mask, backend="reference")

    want = torch.stack([f(*x) for x in zip(q, mask, table, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(q, mask, table), want)
    grads = torch.vmap(torch.func.grad(lambda *x: f(*x).square().sum()))(q, mask, table)
    torch.testing.assert_close(
        grads[1], torch.func.grad(lambda q: f(q, mask[1], table[1]).square().sum())(q[1])
    )


def _routed(q, combine):
    ids = q.mean(-1).argsort(-1).reshape(1, 2, 4, 4)
    return Selection(ids, ids, n_q=16, n_k=16, combine=combine)


INSIDE = {
    "causal": lambda q: Causal(),
    "mixed": lambda q: (Neighborhood(Grid(4, 4), 3) | SlidingWindow(2)) & Causal(),
    "phantoms": lambda q: Halo(Grid(4, 4), 2, 1, border="zero"),
    "routed": lambda q: _routed(q, "lse"),
    "routed mean": lambda q: _routed(q, Mean(0.01)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_patterns_and_selections_made_inside_a_compiled_function(name):
    torch._dynamo.reset()
    f = lambda q: attend(q, q, q, where=INSIDE[name](q))  # noqa: E731
    q = torch.randn(1, 2, 16, 4)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="eager")(q), f(q))
