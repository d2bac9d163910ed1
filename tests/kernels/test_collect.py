"""collect: the transpose of the weights times values, against the weights written out."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.kernels.collect import collect
from foveate.patterns.basic import Causal, Explicit
from foveate.patterns.coarse import Around, Within


def problem(n_q=7, n_k=5, d=4, d_v=3):
    draw = lambda n, e: torch.randn(2, 3, n, e, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return draw(n_q, d), draw(n_k, d), draw(n_q, d_v)


def weights(q, k, allowed=None, scale=0.3):
    logits = q @ k.mT * scale
    logits = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_equals_the_transposed_weights_with_gradients(backend):
    q, k, v = problem()
    _, lse = attend(q, k, k, scale=0.3, return_lse=True)
    out = collect(q, k, v, lse, scale=0.3, backend=backend)
    truth = weights(q, k).mT @ v
    torch.testing.assert_close(out, truth)
    cotangent = torch.randn_like(out)
    mine = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
    theirs = torch.autograd.grad((truth * cotangent).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "tiles", "auto"])
def test_patterns_are_given_transposed(backend):
    q, k, v = problem(n_q=20, n_k=6)
    around, within = Around((4, 5), 2), Within((4, 5), 2)
    _, lse = attend(q, k, k, where=around, scale=0.3, return_lse=True)
    out = collect(q, k, v, lse, where=within, scale=0.3, backend=backend)
    torch.testing.assert_close(out, weights(q, k, around.dense()).mT @ v)


def test_ones_give_the_column_sums_and_all_rows_together_give_one_each():
    q, k, _ = problem()
    _, lse = attend(q, k, k, return_lse=True)
    sums = collect(q, k, torch.ones(2, 3, 7, 1, dtype=torch.float64), lse)
    torch.testing.assert_close(sums.sum((2, 3)), torch.full((2, 3), 7.0, dtype=torch.float64))


def test_queries_without_keys_give_nothing_and_no_nan():
    q, k, v = problem(n_q=7, n_k=5)
    where = Causal()  # of 7 queries that end with 5 keys the first two see none
    _, lse = attend(q, k, k, where=where, scale=0.3, return_lse=True)
    assert lse[:, :, :2].isneginf().all()
    allowed = where.dense(7, 5)
    dead = v.detach().clone()
    dead[:, :, :2] = 1e6
    # Even where the second pass does not hide these queries they give nothing.
    free = collect(q, k, dead, lse, scale=0.3)
    torch.testing.assert_close(
        free, collect(q, k, v * (v.new_tensor([0, 0, 1, 1, 1, 1, 1])[:, None]), lse, scale=0.3)
    )
    out = collect(q, k, dead, lse, where=Explicit(allowed.T), scale=0.3)
    torch.testing.assert_close(out, weights(q, k, allowed).mT @ dead)
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


def test_shared_heads_are_refused():
    q, k, v = problem()
    with pytest.raises(ArgumentError, match="k:"):
        collect(q, k[:, :1], v, torch.zeros(2, 3, 7))
