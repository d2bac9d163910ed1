"""Gathering and scattering of cells as differentiable operators: `foveate::take_cells`,
`foveate::fold_cells`.

Both are linear and each is the other's gradient, so they differentiate any number of times. `fold_cells` adds
in
a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.program import read_items

QUERIES, KEYS = 0, 1


@torch.library.custom_op("foveate::take_cells", mutates_args=())
def take_cells(
    x: Tensor, tensors: Sequence[Tensor], code: Sequence[int], side: int, heads: int
) -> list[Tensor]:
    """Gather the cells of every item: one `(c0, b, h, c1, t, d)` tensor per item.

    Args:
        x: (b, h, n, d).
        tensors: tensors of the Program.
        code: code of the Program.
        side: QUERIES or KEYS.
        heads: query heads; gathered keys have that many where cells differ per head, else the heads of x.
    """
    out = []
    for item in read_items(code, tensors):
        cells = item.take_q(x) if side == QUERIES else item.take_k(x, heads)
        out.append(cells.clone(memory_format=torch.contiguous_format))
    return out


@take_cells.register_fake
def _(x, tensors, code, side, heads):
    out = []
    for item in read_items(code, tensors):
        t = item.tq if side == QUERIES else item.tk
        h = heads if side == KEYS and item.per_head else x.shape[1]
        out.append(x.new_empty((item.c0, x.shape[0], h, item.c1, t, x.shape[3])))
    return out


@torch.library.custom_op("foveate::fold_cells", mutates_args=())
def fold_cells(
    cells: Sequence[Tensor], tensors: Sequence[Tensor], code: Sequence[int], side: int, shape: Sequence[int]
) -> Tensor:
    """Add the cells of every item onto `zeros(shape)`: the transpose of `take_cells`."""
    first = cells[0]
    out = first.new_zeros(tuple(shape))
    for item, part in zip(read_items(code, tensors), cells, strict=True):
        (item.add_q if side == QUERIES else item.add_k)(out, part)
    return out


@fold_cells.register_fake
def _(cells, tensors, code, side, shape):
    return cells[0].new_empty(tuple(shape))


def _setup_take(ctx, inputs, output):
    x, tensors, code, side, heads = inputs
    ctx.save_for_backward(*tensors)
    ctx.code, ctx.side, ctx.heads, ctx.shape = code, side, heads, tuple(x.shape)


def _backward_take(ctx, grads):
    tensors = list(ctx.saved_tensors)
    grad = fold_cells(list(grads), tensors, ctx.code, ctx.side, ctx.shape)
    return grad, [None] * len(tensors), None, None, None


def _setup_fold(ctx, inputs, output):
    cells, tensors, code, side, shape = inputs
    ctx.save_for_backward(*tensors)
    ctx.code, ctx.side, ctx.n = code, side, len(cells)
    # Where cells differ per head, keys have as many heads as queries.
    ctx.heads = max((c.shape[2] for c in cells), default=shape[1])


def _backward_fold(ctx, grad):
    tensors = list(ctx.saved_tensors)
    return take_cells(grad, tensors, ctx.code, ctx.side, ctx.heads), [None] * len(tensors), None, None, None


take_cells.register_autograd(_backward_take, setup_context=_setup_take)
fold_cells.register_autograd(_backward_fold, setup_context=_setup_fold)
