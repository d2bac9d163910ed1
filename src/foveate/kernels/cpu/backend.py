"""Backend `cpu`: gathered tile attention in C++, forward and backward, for static patterns and routed cells.

Cells go to the core as flat arrays (`flatten.py`), in tiles chosen by a cost model (`tiling.py`); scores become
gathered biases (`terms.py`); `op.py` makes it differentiable and one node for torch.compile.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from foveate.core.tracing import constant_while_tracing, fixed
from foveate.kernels.constants import is_traced
from foveate.kernels.cpu import parts, slots, terms
from foveate.kernels.cpu.job import DTYPES, Call
from foveate.kernels.cpu.library import ISA_NAMES, absent, isa
from foveate.kernels.cpu.op import attend_cells
from foveate.kernels.cpu.tiling import (
    cost,
    packed,
    reach,
    single,
    static_cost,
    static_packed,
    static_reach,
    tile_of,
)
from foveate.kernels.problem import Problem
from foveate.patterns.basic import Full
from foveate.patterns.schedule import Schedule
from foveate.scores.rules import NEG_INF, Softmax

NAME = "cpu"
Packed = tuple[tuple[Tensor, ...], tuple[int, ...]]
# Numbers of a head: what fits the core's buffers, and the multiple it computes in (others are filled up with zeros).
MAX_HEAD, HEAD_STEP = 256, 8
# One call through Python, in nanoseconds.
CALL = 150_000.0


@constant_while_tracing
def _absent() -> str | None:
    return absent()


def refuse(problem: Problem) -> str | None:
    """Say why this backend cannot serve the problem, None if it can. Reads ids of routed cells, no other tensor."""
    if problem.where is None and _plain(problem):
        return "dense attention without scores is left to torch's SDPA; where=Full() lets the core do it"
    if problem.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {problem.device.type!r}"
    missing = _absent()
    if missing is not None:
        return missing
    if problem.dtype not in DTYPES:
        return f"the core computes in float32, bfloat16 and float16, not in {str(problem.dtype).removeprefix('torch.')}"
    if max(problem.d, problem.d_v) > MAX_HEAD:
        return f"head sizes {problem.d} and {problem.d_v} are not both {MAX_HEAD} at most"
    if is_traced(problem.q):
        return "its operators cannot run under torch.func transforms (vmap, grad, jvp)"
    schedule = problem.schedule
    if schedule is not None and torch.compiler.is_compiling():
        return "cells that are made from content while compiling cannot be flattened"
    reason = None if problem.one_rule else slots.refuse(problem)
    if reason is not None:
        return reason
    return terms.refuse(problem, lambda slopes=None: _reach(problem, None, slopes))


def _plain(problem: Problem) -> bool:
    """Whether nothing stands between the products and a plain softmax, so that torch's SDPA has it all."""
    if type(problem.weigh) is not Softmax or problem.weigh.sink is not None or problem.return_lse:
        return False
    return len(problem.score) + len(problem.after) == 0


def _where(problem: Problem) -> Any:
    """The static pattern; without `where` the core does what it can do better than a dense kernel without lse."""
    return Full() if problem.where is None else problem.where


def tile(problem: Problem) -> tuple[int, ...] | None:
    """Return the queries of a cell per axis that cost least; None where cells are given."""
    if problem.schedule is not None:
        return None
    return _static_tile(_where(problem), fixed(problem.n_q), fixed(problem.n_k))


@constant_while_tracing
def _static_tile(where: Any, n_q: int, n_k: int) -> tuple[int, ...] | None:
    return tile_of(where, n_q, n_k)


def nanoseconds(problem: Problem, tile: tuple[int, ...] | None) -> float:
    """Predict the time of the forward on two cores."""
    width = problem.d + problem.d_v
    schedule = problem.schedule
    if schedule is None:
        one = static_cost(_where(problem), fixed(problem.n_q), fixed(problem.n_k), tile, fixed(width))
    elif parts.apart(problem):
        one = parts.apart_cost(schedule, width)
    else:
        one = cost(single(schedule) if problem.one_rule else schedule, width)
    return CALL + problem.batch * problem.heads * one / 2


@constant_while_tracing
def describe(dtype: torch.dtype) -> str:
    """Say how the core runs here: the instruction set that this dtype uses, and threads."""
    name = ISA_NAMES[isa()]
    if dtype != torch.bfloat16:
        name = name.removesuffix(" BF16").replace("AMX", "AVX-512")
    return f"{name}, {torch.get_num_threads()} threads"


@constant_while_tracing
def note_absence() -> None:
    """Say once that the core is not there, when another backend takes over on a CPU."""
    _note_absence()


@cache
def _note_absence() -> None:
    missing = absent()
    if missing is not None:
        warnings.warn(
            f"foveate runs on this CPU without its fast core: {missing}. Backend 'tiles' takes over.",
            stacklevel=5,
        )


def run(problem: Problem, plan: Any) -> tuple[Float[Tensor, "b h nq dv"], Float[Tensor, "b h nq"] | None]:
    """Return the output in the dtype of q, and the natural-log lse in float32 (or None)."""
    read = terms.read(problem, lambda slopes=None: _reach(problem, plan.tile, slopes))
    if 0 in (*problem.q.shape, *problem.k.shape):
        return _nothing(problem, read)
    if parts.apart(problem):
        q, k, v = (_whole(x) for x in (problem.q, problem.k, problem.v))
        out, lse = parts.attend_apart(problem, plan.schedule.to("cpu"), q, k, v)
        return out[..., : problem.d_v], lse if problem.return_lse else None
    if problem.one_rule:
        cells = _cells(problem, plan, with_keys=problem.needs_grad)
        out, lse = _call(problem, problem.q, read, cells)
        return out, lse if problem.return_lse else None
    places = slots.Slots.of(plan.schedule.to("cpu"))
    cells = packed(places.schedule, problem.needs_grad)
    out, _ = _call(problem, places.rows(problem.q), places.terms(read), cells)
    return places.combine(out, problem), None


def _call(problem: Problem, q: Tensor, read: terms.Terms, cells: Packed) -> tuple[Tensor, Tensor]:
    arrays, (pairs, *facts) = cells
    q, k, v = (_whole(x) for x in (q, problem.k, problem.v))
    if facts[1] > 1 and k.shape[1] < q.shape[1] and problem.needs_grad:
        # Cells of one head each: for its gradient a key has its own queries for every head that reads it.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    codes = [code for term in read.terms for code in (term.q_code, term.k_code)]
    call = Call(
        q, k, v, read.factor, read.sink, [term.table for term in read.terms], codes, list(arrays),
        [read.rule, pairs, *facts, *(term.base for term in read.terms)],
        [problem.scale, read.softcap, read.sigmoid_bias],
    )  # fmt: skip
    out, lse = attend_cells(call)
    if v.shape[3] > problem.d_v:
        out = out[..., : problem.d_v]
    return out, lse


def _whole(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d8"]:
    """Fill heads up with zeros, which change no product, to a width the core computes in; rows contiguous."""
    missing = -x.shape[3] % HEAD_STEP
    if missing:
        return pad(x, (0, missing))
    return x if x.stride(3) == 1 else x.contiguous()


def _cells(problem: Problem, plan: Any, with_keys: bool) -> Packed:
    if problem.schedule is None:
        return static_packed(_where(problem), fixed(problem.n_q), fixed(problem.n_k), plan.tile, with_keys)
    schedule: Schedule = plan.schedule
    return packed(schedule.to("cpu"), with_keys)


def _reach(problem: Problem, tile: tuple[int, ...] | None, slopes: tuple[int, ...] | None) -> tuple | None:
    if problem.schedule is not None:
        return reach(problem.schedule, slopes)
    return static_reach(_where(problem), fixed(problem.n_q), fixed(problem.n_k), tile, slopes)


def _nothing(problem: Problem, read: terms.Terms) -> tuple[Tensor, Tensor | None]:
    """No pair anywhere: zeros that still belong to the graph."""
    out = problem.q.new_zeros((*problem.q.shape[:3], problem.d_v))
    out = out + 0.0 * (problem.q.sum() + problem.k.sum() + problem.v.sum())
    if not problem.return_lse:
        return out, None
    lse = torch.full(problem.q.shape[:3], NEG_INF)
    return out, lse if read.sink is None else read.sink[:, None].expand_as(lse).contiguous()
