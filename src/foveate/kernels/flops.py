"""FLOP formulas of attention, and a counter that knows the operators torch's own counter misses.

torch's `FlopCounterMode` reports 0 for the fused attention operator of CPUs, and cannot know ours. Its table
is a process-wide registry; nothing here writes to it (importing foveate changes no other program's numbers).
The formulas are handed to one counter at a time instead: `with FlopCounter() as count: ...`, then
`count.get_total_flops()`.

One multiply-add counts as 2. A masked or causal call counts as dense, as torch's own formulas do for CUDA:
these formulas count what an operator was asked to multiply, `explain` counts what a pattern needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate.kernels.fused  # noqa: F401  registers our operators
from foveate.kernels.cpu.scan import CHUNK, CHUNK_PER_CHANNEL
from foveate.kernels.program import pairs_of
from foveate.kernels.scan.cost import backward_flops, scan_cost

# Matrix products over all computed pairs. The forward has two (q k^T and weights v). A backward that
# recomputes the logits has five: logits, d weights, dv, dq, dk. One that kept the weights has four.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5
BACKWARD_PRODUCTS_STORED = 4


def attention_flops(pairs: int, d: int, d_v: int) -> int:
    """Return the FLOPs of the forward: `pairs` products of length `d` and as many of length `d_v`.

    Args:
        pairs: (query, key) pairs that are multiplied, over batch and query heads.
        d: length of a query and a key.
        d_v: length of a value.
    """
    return 2 * pairs * (d + d_v)


def attention_backward_flops(pairs: int, d: int, d_v: int, *, recompute: bool = True, passes: int = 1) -> int:
    """Return the FLOPs of the backward.

    Args:
        pairs: (query, key) pairs that are multiplied, over batch and query heads.
        d: length of a query and a key.
        d_v: length of a value.
        recompute: whether the logits are computed again (fused kernels) or the weights were kept.
        passes: how often pairs are visited: 2 where once for queries and once for keys.
    """
    # dq and dk (and the logits once more, in every pass): d; dv and (in every pass) d weights: d_v.
    return 2 * pairs * ((2 + passes * recompute) * d + (1 + passes) * d_v)


def _forward_formula(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    """FLOPs of `_scaled_dot_product_flash_attention_for_cpu` from (b, h, n, d) shapes."""
    pairs = math.prod(query[:-1]) * key[-2]
    return attention_flops(pairs, query[-1], value[-1])


def _backward_formula(
    grad_out: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__
) -> int:
    """FLOPs of `_scaled_dot_product_flash_attention_for_cpu_backward`."""
    pairs = math.prod(query[:-1]) * key[-2]
    return attention_backward_flops(pairs, query[-1], value[-1])


def _tiles_pairs(query: Sequence[int], tensors: Sequence[Sequence[int]], code: Sequence[int]) -> int:
    """Return the pairs a call of `foveate::tiles` computes; the items follow one bias position each."""
    return query[0] * query[1] * pairs_of(code[1 + code[0] :], tensors)


def _tiles_formula(query, key, value, tensors, code, *_, **__) -> int:
    """FLOPs of `foveate::tiles`."""
    return attention_flops(_tiles_pairs(query, tensors, code), query[-1], value[-1])


def _tiles_backward_formula(grad, grad_lse, query, key, value, out, lse, tensors, code, *_, **__) -> int:
    """FLOPs of `foveate::tiles_backward`."""
    return attention_backward_flops(_tiles_pairs(query, tensors, code), query[-1], value[-1])


def _cpu_pairs(query: Sequence[int], spec: Sequence[int]) -> int:
    """Pairs a call of `foveate::cpu` computes: those of its cells, for every batch and head that shares them."""
    _, pairs, lead_b, lead_h, *_ = spec
    return pairs * (query[0] // max(lead_b, 1)) * (query[1] // max(lead_h, 1))


def _cpu_formula(query, key, value, factor, sink, tables, codes, cells, spec, *_, **__) -> int:
    """FLOPs of `foveate::cpu`."""
    return attention_flops(_cpu_pairs(query, spec), query[-1], value[-1])


def _cpu_backward_formula(
    grad, grad_lse, out, lse, query, key, value, factor, sink, tables, codes, cells, spec, *_, **__
) -> int:
    """FLOPs of `foveate::cpu_backward`."""
    return attention_backward_flops(_cpu_pairs(query, spec), query[-1], value[-1], passes=2)


def _scan_shapes(query: Sequence[int], value: Sequence[int], decay: Sequence[int] | None) -> dict[str, Any]:
    """Return how `scan_cost` calls what the core's scan does."""
    batch, heads, n, dk = query
    channels = decay is not None and decay[3] > 1
    kind = "channel" if channels else "token"
    chunk = CHUNK_PER_CHANNEL if channels else CHUNK
    sizes = {"batch": batch, "heads": heads, "n": n, "dk": dk, "dv": value[3]}
    return {**sizes, "decay": kind, "chunk": chunk}


def _scan_formula(query, key, value, decay, *_, **__) -> int:
    """FLOPs of `foveate::scan`."""
    return scan_cost(**_scan_shapes(query, value, decay)).flops


def _scan_backward_formula(grad, grad_last, borders, query, key, value, decay, *_, **__) -> int:
    """FLOPs of `foveate::scan_backward`."""
    return backward_flops(**_scan_shapes(query, value, decay))


def _bag_formula(table, ids, offsets, scale=False, mode=0, sparse=False, weights=None, *_, **__) -> int:
    """FLOPs of the `_embedding_bag` operators: a row of the table times its weight, for every id.

    Without weights rows are only added up: nothing is multiplied.
    """
    return 0 if weights is None else 2 * math.prod(ids) * table[-1]


def _bag_rows_formula(
    grad, ids, offsets, bags, sizes, maximal, rows, scale=False, mode=0, sparse=False, weights=None, *_, **__
) -> int:
    """FLOPs of `_embedding_bag_backward`: the weight times the gradient of the bag, for every id."""
    return 0 if weights is None else 2 * math.prod(ids) * grad[-1]


def _bag_weights_formula(grad, table, ids, *_, **__) -> int:
    """FLOPs of `_embedding_bag_per_sample_weights_backward`: a product of two rows for every id."""
    return 2 * math.prod(ids) * grad[-1]


def _grid_formula(maps: Sequence[int], points: Sequence[int], *_, **__) -> int:
    """FLOPs of `grid_sampler_2d` and `_3d`: 2^axes pixels around every point, each times its share."""
    return 2 * 2 ** points[-1] * math.prod(points[:-1]) * maps[1]


def _grid_backward_formula(
    grad, maps, points, interpolation, padding, corners, output_mask=(True, True), **_
) -> int:
    """FLOPs of the backward of `grid_sampler_2d` and `_3d`: as much for the maps, and for the points."""
    return sum(output_mask) * _grid_formula(maps, points)


def formulas() -> dict[Any, Callable[..., int]]:
    """Return {operator: formula} for what torch's counter does not know, in its `custom_mapping` form."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward_formula,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_formula,
        # What `sample` runs.
        aten._embedding_bag: _bag_formula,
        aten._embedding_bag_forward_only: _bag_formula,
        aten._embedding_bag_backward: _bag_rows_formula,
        aten._embedding_bag_per_sample_weights_backward: _bag_weights_formula,
        aten.grid_sampler_2d: _grid_formula,
        aten.grid_sampler_3d: _grid_formula,
        aten.grid_sampler_2d_backward: _grid_backward_formula,
        aten.grid_sampler_3d_backward: _grid_backward_formula,
        torch.ops.foveate.tiles: _tiles_formula,
        torch.ops.foveate.tiles_backward: _tiles_backward_formula,
        torch.ops.foveate.cpu: _cpu_formula,
        torch.ops.foveate.cpu_backward: _cpu_backward_formula,
        torch.ops.foveate.scan: _scan_formula,
        torch.ops.foveate.scan_backward: _scan_backward_formula,
    }


class FlopCounter(FlopCounterMode):
    """torch's `FlopCounterMode` with the missing formulas, for the code inside one `with` block.

    Args:
        mods: modules to report separately (torch finds them by itself, kept for its signature).
        depth: how deep the module table goes.
        display: whether the table is printed at exit; off, unlike torch's.
        custom_mapping: further formulas; they win over ours.
    """

    def __init__(self, mods=None, depth: int = 2, display: bool = False, custom_mapping=None):
        super().__init__(
            mods=mods, depth=depth, display=display, custom_mapping={**formulas(), **(custom_mapping or {})}
        )


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Call `fn(*args, **kwargs)` once and return the FLOPs of the operators it ran (backward included)."""
    with FlopCounter() as counter:
        fn(*args, **kwargs)
    return counter.get_total_flops()
