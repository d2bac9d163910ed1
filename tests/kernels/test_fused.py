"""The operators `foveate::tiles`, `take_cells`, `fold_cells`, and torch's private ones they stand on."""

import pytest
import torch
from torch.library import opcheck

from foveate.core.grid import Grid
from foveate.kernels.fused import tiles
from foveate.kernels.program import Program, program
from foveate.kernels.transfer import KEYS, QUERIES, fold_cells, take_cells
from foveate.patterns.grids import Neighborhood
from foveate.patterns.lower import lower
from foveate.patterns.selection import Selection

forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def test_schema_of_the_private_operators():
    assert str(forward.default._schema) == (
        "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, "
        "float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor output, Tensor logsumexp)"
    )
    assert str(backward.default._schema) == (
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, "
        "Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, "
        "Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_meaning_of_the_private_operators(dtype):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.randn(5, 7)
    mask[2] = -torch.inf
    low = [x.to(dtype) for x in (q, k, v)]
    out, lse = forward(
        *low, 0.0, False, attn_mask=mask.to(torch.promote_types(dtype, torch.float32)), scale=0.3
    )
    q, k, v = (x.double() for x in low)
    logits = q @ k.mT * 0.3 + mask
    want = logits.logsumexp(-1)
    seen = want > -torch.inf
    torch.testing.assert_close(lse.double()[seen], want[seen], rtol=1e-5, atol=1e-5)
    assert lse[~seen].isfinite().all()
    assert (out[~seen] == 0).all()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_backward_reads_rowsum_of_grad_and_out():
    # The trick by which the gradient of the lse comes in: d logits = w * (grad.v - rowsum(grad * out)).
    q, k, v, grad = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(4))
    out, lse = forward(q, k, v, 0.0, False)
    fake = torch.randn_like(out)
    dq, _, _ = backward(grad, q, k, v, fake, lse, 0.0, False)
    weights = torch.softmax(q @ k.mT * 8**-0.5, -1)
    inner = weights * (grad @ v.mT - (grad * fake).sum(-1, keepdim=True))
    torch.testing.assert_close(dq, inner @ k * 8**-0.5)


def cases() -> list[Program]:
    found = []
    where = Neighborhood(Grid(6, 7), 3)
    ids = torch.randperm(42).view(1, 1, 3, 14).expand(2, 2, -1, -1)
    routed = Selection(ids, ids.flip(2), torch.rand(2, 2, 3, 14, 14) > 0.3, n_q=42, n_k=42)
    for schedule in (lower(where, 42, tile=(3, 4)), routed.schedule):
        found.append(program(schedule, torch.device("cpu")))
    return found


@pytest.mark.parametrize("prog", cases(), ids=["boxes", "ids"])
@pytest.mark.parametrize("lse_grad", [False, True])
def test_opcheck_tiles(prog, lse_grad):
    q = torch.randn(2, 2, 42, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 42, 8, requires_grad=True) for _ in range(2))
    code = [prog.n_items, *([-1] * prog.n_items), *prog.code]
    opcheck(tiles, (q, k, v, list(prog.tensors), code, 0.3, lse_grad), test_utils=(
        "test_schema", "test_faketensor", "test_autograd_registration",
    ))  # fmt: skip


@pytest.mark.parametrize("prog", cases(), ids=["boxes", "ids"])
@pytest.mark.parametrize("side", [QUERIES, KEYS])
def test_take_and_fold_are_transposes(prog, side):
    x = torch.randn(2, 2, 42, 4, dtype=torch.float64)
    tensors, code = list(prog.tensors), list(prog.code)
    cells = take_cells(x, tensors, code, side, 2)
    y = [torch.randn_like(c) for c in cells]
    folded = fold_cells(y, tensors, code, side, list(x.shape))
    left = sum((a * b).sum() for a, b in zip(cells, y, strict=True))
    torch.testing.assert_close(left, (x * folded).sum())
    opcheck(
        take_cells,
        (x.requires_grad_(), tensors, code, side, 2),
        test_utils=("test_schema", "test_faketensor"),
    )
    opcheck(
        fold_cells, (y, tensors, code, side, list(x.shape)), test_utils=("test_schema", "test_faketensor")
    )
