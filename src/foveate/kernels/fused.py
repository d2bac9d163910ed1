"""Softmax attention over the cells of a Program, as one differentiable operator: `foveate::tiles`.

Forward: gather a block of cells, run the fused CPU attention operator of torch on it, write the result where
it belongs. Backward: gather again, run that operator's backward, add key and value gradients up in a fixed
order. Nothing per cell is kept in between, so memory stays near that of the inputs, outputs and gradients. As
a torch.library operator it is one node for torch.compile and torch.export.

Every query must be in at most one cell. On other devices than CPUs the block is computed by matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import UnsupportedError
from foveate.kernels.cells import Item, fold_heads, unfold_heads
from foveate.kernels.program import read_items

# Bytes of keys and values gathered at a time. Measured on a 2-core server: blocks that leave the last-level
# cache or that malloc hands back to the system (32 MiB) cost more in page faults than in arithmetic.
BLOCK_BYTES = 12 << 20
NEG_INF = float("-inf")

# Private operators of torch: their schema and meaning are pinned by tests/kernels/test_fused.py.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Block:
    """Some cells of one item, for some batches and key heads; slices and gathers whatever it is given."""

    def __init__(self, item: Item, bias: Tensor | None, b: slice, hkv: slice, groups: int, heads: int):
        self.item, self.bias, self.b, self.hkv = item, bias, b, hkv
        # Cells that differ per head gather keys per query head: no sharing.
        self.share = 1 if item.per_head else groups
        self.h = slice(hkv.start * groups, hkv.stop * groups)
        self.heads, self.shape = heads, (0, 0, 0)

    def queries(self, x: Tensor) -> Tensor:
        cells = self.item.take_q(x[self.b, self.h])
        self.shape = (cells.shape[1], cells.shape[2], cells.shape[3])
        return _rows(fold_heads(cells, self.share))

    def keys(self, x: Tensor) -> Tensor:
        cells = self.item.take_k(x[self.b, self.hkv], self.h.stop - self.h.start)
        return _rows(cells.flatten(1, 3))

    def mask(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive mask, broadcastable to the block's logits, and which rows it empties."""
        mask, bias = self.item.mask, self.bias
        if mask is None and bias is None:
            return None, None
        total = None
        if mask is not None:
            total = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, NEG_INF)
            total = _slice(total, self.b, self.h)
        if bias is not None:
            bias = _slice(bias, self.b, self.h).to(dtype)
            total = bias if total is None else total + bias
        assert total is not None
        rows, keys = self.item.tq, self.item.tk
        empty = (total == NEG_INF).all(-1)
        c0 = total.shape[2]
        if total.shape[:2] == (1, 1) and total.shape[3] == 1:  # (1, 1, c0 or 1, 1, tq or 1, tk)
            total = total[0, 0, :, :, None].expand(c0, 1, self.share, rows, keys)
            total = total.reshape(c0, 1, self.share * rows, keys)
            empty = empty[0, 0, :, :, None].expand(c0, 1, self.share, rows).reshape(c0, 1, -1)
        else:
            b, h, c1 = self.shape
            total = total.expand(b, h, c0, c1, rows, keys).permute(2, 0, 1, 3, 4, 5)
            empty = empty.expand(b, h, c0, c1, rows).permute(2, 0, 1, 3, 4)
            total = fold_heads(total, self.share)
            empty = fold_heads(empty.unsqueeze(-1), self.share).squeeze(-1)
        return total, empty if bool(empty.any()) else None

    def put(self, x: Tensor, cells: Tensor) -> None:
        self.item.put_q(x[self.b, self.h], unfold_heads(cells, self.share, *self.shape))

    def add_keys(self, x: Tensor, cells: Tensor) -> None:
        part = x[self.b, self.hkv]
        heads = self.shape[1] // self.share
        self.item.add_k(part, cells.unflatten(1, (self.shape[0], heads, self.shape[2])))


def _slice(x: Tensor, b: slice, h: slice) -> Tensor:
    """Slice the batch and head dimensions where they are not broadcast."""
    return x[b if x.shape[0] > 1 else slice(None), h if x.shape[1] > 1 else slice(None)]


def _rows(x: Tensor) -> Tensor:
    """The fused operators read rows as contiguous numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(
    items: Sequence[Item], biases: Sequence[Tensor | None], q: Tensor, k: Tensor, v: Tensor
) -> Iterator[_Block]:
    """Cut the work into blocks of about BLOCK_BYTES of gathered keys and values."""
    batch, heads, hkv = q.shape[0], q.shape[1], k.shape[1]
    groups = heads // hkv
    width = (k.shape[3] + v.shape[3]) * k.element_size()
    for item, bias in zip(items, biases, strict=True):
        copies = groups if item.per_head else 1
        one = item.key_rows() * width * copies  # per batch and key head
        mask = item.mask
        if bias is not None or (mask is not None and mask.shape[:2] != (1, 1)):
            one = max(one, item.c0 * item.c1 * item.tq * item.tk * 4 * groups)
        n_heads = max(1, min(hkv, BLOCK_BYTES // max(one, 1)))
        n_batch = max(1, min(batch, BLOCK_BYTES // max(one * hkv, 1))) if n_heads == hkv else 1
        if not item.static:  # ids per batch and head address the whole tensors, those are not sliced
            n_heads, n_batch, one = hkv, batch, one * batch * hkv
        n_cells = item.cells
        if one > BLOCK_BYTES:
            n_cells = max(1, item.cells * BLOCK_BYTES // one)
        along = 2 if item.static else 3
        for first in range(0, item.cells, n_cells):
            last = min(first + n_cells, item.cells)
            part, part_bias = item, bias
            if n_cells < item.cells:
                part = item.narrow(first, last)
                if bias is not None and bias.shape[along] > 1:
                    part_bias = bias.narrow(along, first, last - first)
            for b in range(0, batch, n_batch):
                for h in range(0, hkv, n_heads):
                    b_slice, h_slice = slice(b, min(b + n_batch, batch)), slice(h, min(h + n_heads, hkv))
                    yield _Block(part, part_bias, b_slice, h_slice, groups, heads)


def _unpack(tensors: Sequence[Tensor], code: Sequence[int]) -> tuple[Sequence[Item], list[Tensor | None]]:
    """Read items and one optional bias per item: `code` is [n, bias position or -1 ..., items ...]."""
    n = code[0]
    items = read_items(tuple(code[1 + n :]), tensors)
    return items, [None if at < 0 else tensors[at] for at in code[1 : 1 + n]]


@torch.library.custom_op("foveate::tiles", mutates_args=())
def tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    code: Sequence[int],
    scale: float,
    lse_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Attend within cells.

    Args:
        q: (b, h, n_q, d).
        k: (b, h_kv, n_k, d).
        v: (b, h_kv, n_k, d_v).
        tensors: what `code` points to: ids, masks, and biases that broadcast to (b, h, c0, c1, tq, tk).
        code: `[number of items, position of each item's bias or -1, .., the items as in Program.code]`.
        scale: factor on the products.
        lse_grad: whether the lse will be differentiated.

    Returns:
        `out (b, h, n_q, d_v)` in the dtype of q and `lse (b, h, n_q)` in the accumulation dtype; queries in
        no cell and rows without a key get 0 and -inf.
    """
    items, biases = _unpack(tensors, code)
    width = max(q.shape[3], v.shape[3])
    wide_q, wide_k, wide_v = _pad(q, width), _pad(k, width), _pad(v, width)
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full((*q.shape[:3], 1), NEG_INF, dtype=accumulation_dtype(q.dtype))
    for block in _blocks(items, biases, q, k, v):
        qc, kc, vc = block.queries(wide_q), block.keys(wide_k), block.keys(wide_v)
        mask, empty = block.mask(_mask_dtype(q, block))
        o, row = _attend(qc, kc, vc, mask, scale)
        if empty is not None:
            row = row.masked_fill(empty, NEG_INF)
        block.put(out, o[..., : v.shape[3]])
        block.put(lse, row.unsqueeze(-1))
    return out, lse.squeeze(-1)


@tiles.register_fake
def _(q, k, v, tensors, code, scale, lse_grad):
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("foveate::tiles_backward", mutates_args=())
def tiles_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor],
    code: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `tiles` with respect to q, k and v."""
    items, biases = _unpack(tensors, code)
    accumulate = accumulation_dtype(q.dtype)
    extra = 0 if grad_lse is None else 8
    width = max(q.shape[3], v.shape[3]) + extra
    wide_q, wide_k, wide_v, wide_grad, wide_out = (_pad(x, width) for x in (q, k, v, grad, out))
    if grad_lse is not None:
        # The operator subtracts rowsum(grad * out) from d weights; the lse needs `- grad_lse` in there. A
        # column that only grad and out have puts it in. Rows without a key keep 0.
        wide_grad[..., -1] = 1.0
        wide_out[..., -1] = -grad_lse.masked_fill(lse == NEG_INF, 0.0).to(out.dtype)
    finite = lse.masked_fill(lse == NEG_INF, 0.0).unsqueeze(-1)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (k, v))
    for block in _blocks(items, biases, q, k, v):
        qc, kc, vc = block.queries(wide_q), block.keys(wide_k), block.keys(wide_v)
        gc, oc, row = block.queries(wide_grad), block.queries(wide_out), block.queries(finite).squeeze(-1)
        mask, _ = block.mask(_mask_dtype(q, block))
        gq, gk, gv = _attend_backward(gc, qc, kc, vc, oc, row, mask, scale)
        block.put(dq, gq[..., : q.shape[3]])
        block.add_keys(dk, gk[..., : k.shape[3]])
        block.add_keys(dv, gv[..., : v.shape[3]])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@tiles_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, tensors, code, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, tensors, code, scale, lse_grad = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *tensors)
    ctx.code, ctx.scale, ctx.lse_grad = code, scale, lse_grad


def _backward(ctx, grad, grad_lse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    wanted = grad_lse if ctx.lse_grad else None
    dq, dk, dv = tiles_backward(grad, wanted, q, k, v, out, lse, tensors, ctx.code, ctx.scale)
    return dq, dk, dv, [None] * len(tensors), None, None, None


def _no_double_backward(ctx, *grads):
    raise UnsupportedError(
        "backend 'tiles' has no second derivative where it runs fused. Use backend='reference' for it."
    )


tiles.register_autograd(_backward, setup_context=_setup)
tiles_backward.register_autograd(_no_double_backward)


def _pad(x: Tensor, width: int) -> Tensor:
    """Lengthen rows with zeros: products stay as they are, and the fused operator wants one head size."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _mask_dtype(q: Tensor, block: _Block) -> torch.dtype:
    """-inf and 0 are exact in every dtype; biases keep the accumulation dtype."""
    return q.dtype if block.bias is None else accumulation_dtype(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention on (x, y, t, d) blocks: `(out, lse)`; rows without a key give 0 and any finite lse."""
    if q.device.type == "cpu":
        return _FORWARD(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    accumulate = accumulation_dtype(q.dtype)
    logits = (q.to(accumulate) @ k.to(accumulate).mT) * scale
    if mask is not None:
        logits = logits + mask
    lse = logits.logsumexp(-1)
    lse = lse.masked_fill(lse == NEG_INF, 0.0)
    return (torch.exp(logits - lse.unsqueeze(-1)) @ v.to(accumulate)).to(q.dtype), lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_attend`, weights recomputed from the lse."""
    if q.device.type == "cpu":
        return _BACKWARD(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    accumulate = accumulation_dtype(q.dtype)
    grad, q, k, v, out = (x.to(accumulate) for x in (grad, q, k, v, out))
    logits = (q @ k.mT) * scale
    if mask is not None:
        logits = logits + mask
    weights = torch.exp(logits - lse.unsqueeze(-1))
    inner = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return inner @ k, inner.mT @ q, weights.mT @ grad
