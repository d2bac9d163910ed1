"""Scores, rule and mask as the core knows them: one factor per row, up to four gathered biases, a soft-cap, a sink.

Every bias is `table[b, h, q_code[q] + k_code[k] + base]`. A bias that depends on the offset between a query and a key
alone becomes a table over the offsets that occur, made by asking the score itself; a bias per key or per pair is its
own table; rows that belong to a query (or key) are indexed by a form `f` proved linear by feeding it symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from foveate.core.grid import Grid
from foveate.kernels.constants import constant
from foveate.kernels.cpu.library import MAX_TERMS, SIGMOID, SOFTMAX
from foveate.kernels.cpu.linear import Linear, linear_form
from foveate.kernels.problem import Problem
from foveate.scores.banks import AddedOnKeys
from foveate.scores.base import Score, lift
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.buckets import BucketTable
from foveate.scores.distance import ALiBi, DistanceDecay
from foveate.scores.pairs import Pairs
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import NEG_INF, Sigmoid, Softmax
from foveate.scores.skew import RelativeLogits, columns
from foveate.scores.temperature import RowFactor, SoftCap

# Numbers of one table; indices stay far from the end of int32.
MAX_TABLE = 1 << 27
# Code of a token that has no bias: with anything added it stays below every index, and entry 0 is then zero.
_NOWHERE = -(1 << 29)


class Term(NamedTuple):
    """One gathered bias."""

    table: Float32[Tensor, "b h s"]
    q_code: Int32[Tensor, "nq"]
    k_code: Int32[Tensor, "nk"]
    base: int


class Terms(NamedTuple):
    """Everything between the products and the weights."""

    rule: int
    factor: Float32[Tensor, "b h nq"] | None
    sink: Float32[Tensor, "h"] | None
    terms: list[Term]
    softcap: float
    sigmoid_bias: float


# `static_reach` of the cells of a call, as a function of the slopes.
Reach = Callable[..., "tuple | None"]


def refuse(problem: Problem, reach: Reach) -> str | None:
    """Say what the core does not know (a phrase), None if it knows it all. Reads no tensor.

    Args:
        problem: the call.
        reach: gives `static_reach` of its cells; asked only when a table over offsets needs it.
    """
    if problem.after:
        return f"{type(problem.after[0]).__name__} changes the weights, which the core never stores"
    rule = problem.weigh
    if type(rule) not in (Softmax, Sigmoid):
        return f"the core weighs by Softmax or Sigmoid, not by {type(rule).__name__}"
    biases, capped = 0, False
    for part in problem.score:
        name = type(part).__name__
        if capped:
            return f"{name} comes after SoftCap, which is the core's last step"
        if type(part) is RowFactor:
            if biases:
                return "RowFactor comes after an added score; the core multiplies first"
        elif type(part) is SoftCap:
            capped = True
        else:
            reason = _refuse_bias(part, problem, reach)
            if reason is not None:
                return reason
            biases += 1
    if problem.mask is not None:
        if capped:
            return "the mask comes after SoftCap, which is the core's last step"
        if math.prod(problem.mask.shape[2:]) > MAX_TABLE:
            return f"the mask has more than {MAX_TABLE} entries per batch and head"
        biases += 1
    if isinstance(rule, Sigmoid) and isinstance(rule.bias, Tensor):
        if capped:
            return "the bias of Sigmoid is a tensor and comes after SoftCap, which is the core's last step"
        biases += 1
    if biases > MAX_TERMS:
        return f"there are {biases} biases; the core adds {MAX_TERMS}"
    return None


def _refuse_bias(part: Score, problem: Problem, reach: Reach) -> str | None:
    kind, name = type(part), type(part).__name__
    if kind is KeyBias:
        return None
    if kind is Bias:
        too_many = math.prod(part.bias.shape[-2:]) > MAX_TABLE  # type: ignore[attr-defined]
        return f"Bias has more than {MAX_TABLE} entries per batch and head" if too_many else None
    if kind in _OFFSET_KINDS:
        frame = _frame(part, problem)
        if isinstance(frame, str):
            return frame
        size = math.prod([hi - lo + 1 for lo, hi in _ranges(frame, reach)])
        if size > MAX_TABLE or size * problem.heads > MAX_TABLE:
            return f"{name} would need a table of {size} offsets per head"
        return None
    if kind is RelativeLogits:
        return _refuse_skewed(part, problem, reach)  # type: ignore[arg-type]
    if kind is Gathered:
        found = _gathered(part, problem, reach)  # type: ignore[arg-type]
        return found if isinstance(found, str) else None
    if isinstance(part, AddedOnKeys) and problem.frame is None:
        return _refuse_bias(part.score, _range_of(part, problem), _unknown_reach)
    return f"the core does not know {name}"


def read(problem: Problem, reach: Reach) -> Terms:
    """Return the terms of a problem that `refuse` let pass; differentiable tensor code."""
    factor, terms, softcap = None, [], 0.0
    for part in problem.score:
        if type(part) is RowFactor:
            t = lift(part.t, 3).float()
            factor = t if factor is None else factor * t
        elif type(part) is SoftCap:
            softcap = float(part.cap)
        else:
            terms.append(_term(part, problem, reach))
    if problem.mask is not None:
        terms.append(_mask_term(problem))
    rule, sink, sigmoid_bias = SOFTMAX, None, 0.0
    if isinstance(problem.weigh, Sigmoid):
        rule = SIGMOID
        if isinstance(problem.weigh.bias, Tensor):
            terms.append(_constant_term(problem.weigh.bias, problem))
        else:
            sigmoid_bias = float(problem.weigh.bias)
    elif isinstance(problem.weigh, Softmax) and problem.weigh.sink is not None:
        sink = torch.as_tensor(problem.weigh.sink, dtype=torch.float32).reshape(-1)
        # The core takes differences with the sink, so that -inf would make NaN of an empty row.
        sink = sink.expand(problem.heads).clamp_min(-1e30).contiguous()
    if factor is not None:
        factor = factor.expand(-1, -1, problem.n_q).contiguous()
    return Terms(rule, factor, sink, terms, softcap, sigmoid_bias)


def _term(part: Score, problem: Problem, reach: Reach) -> Term:
    if isinstance(part, KeyBias):
        b = lift(part.b, 3)
        return _map_term(b.unsqueeze(2), problem)
    if isinstance(part, Bias):
        return _map_term(lift(part.bias, 4), problem)
    if isinstance(part, Gathered):
        return _gathered_term(part, problem, reach)
    if isinstance(part, RelativeLogits):
        return _skewed_term(part, problem, reach)
    if isinstance(part, AddedOnKeys):
        return _lifted_term(part, problem)
    return _offset_term(part, problem, reach)


# ---- scores of a range of keys ----------------------------------------------------------------------------------


def _range_of(part: AddedOnKeys, problem: Problem) -> Problem:
    """Return the problem as the score of a range of keys sees it."""
    keys = slice(part.first, part.first + part.n)
    return replace(problem, k=problem.k[:, :, keys], v=problem.v[:, :, keys])


def _unknown_reach(slopes: tuple[int, ...] | None = None) -> None:
    return None


def _lifted_term(part: AddedOnKeys, problem: Problem) -> Term:
    """Other keys read a zero in front of the table."""
    term = _term(part.score, _range_of(part, problem), _unknown_reach)
    before, after = part.first, problem.n_k - part.first - part.n
    k_code = torch.nn.functional.pad(term.k_code, (before, after), value=_NOWHERE)
    return Term(torch.nn.functional.pad(term.table, (1, 0)).contiguous(), term.q_code, k_code, term.base + 1)


# ---- maps -------------------------------------------------------------------------------------------------------


def _map_term(bias: Tensor, problem: Problem) -> Term:
    """A map (b, h, 1 or n_q, 1 or n_k) is its own table. Phantom keys read 0 unless keys broadcast."""
    if problem.frame is not None and bias.shape[3] > 1:
        bias = problem.frame.pad(bias, dim=3)
    rows, columns = bias.shape[2:]
    q_code, k_code = _map_codes(problem.n_q, problem.n_k, columns if rows > 1 else 0, int(columns > 1))
    return Term(bias.float().flatten(2).contiguous(), q_code, k_code, 0)


def _mask_term(problem: Problem) -> Term:
    mask = problem.mask
    assert mask is not None
    if not mask.is_floating_point():
        zero = torch.zeros((), dtype=torch.float32)
        mask = torch.where(mask, zero, zero + NEG_INF)
    return _map_term(mask, problem)


def _constant_term(x: Tensor, problem: Problem) -> Term:
    """A number, or one per head."""
    q_code, k_code = _map_codes(problem.n_q, problem.n_k, 0, 0)
    return Term(x.float().reshape(1, -1, 1).contiguous(), q_code, k_code, 0)


@constant
@lru_cache(maxsize=32)
def _map_codes(n_q: int, n_k: int, pitch_q: int, pitch_k: int) -> tuple[Tensor, Tensor]:
    return (torch.arange(n_q) * pitch_q).int(), (torch.arange(n_k) * pitch_k).int()


# ---- rows of queries or keys ------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """How a Gathered is read: entry `form - first` of `count` entries of a row, those U lacks clipped."""

    form: Linear
    q_sizes: tuple[int, ...]
    k_sizes: tuple[int, ...]
    first: int
    count: int


def _gathered(part: Gathered, problem: Problem, reach: Reach) -> _Rows | str:
    """Return the proved form of `f`, in coordinates from 0 on, with what it reads, or why it cannot be used."""
    frame = _frame(part, problem)
    if isinstance(frame, str):
        return frame
    q_sizes, k_sizes = frame.q_sizes, frame.k_sizes
    if len(q_sizes) != len(k_sizes):
        return "Gathered counts queries and keys on grids of different numbers of axes"
    if math.prod(q_sizes) != problem.n_q or math.prod(k_sizes) != problem.n_k:
        return "Gathered counts on a grid that is not that of the tokens"
    form = linear_form(part.f, len(q_sizes))
    if form is None:
        return "the index function of Gathered is not a linear form of the coordinates"
    form = form.shifted_keys(frame.low)
    n, rows = part.U.shape[2:]
    if part.side == "key":
        n = problem.n_k
    first, count = 0, rows
    if part.clip:
        known = reach(form.slopes())
        if known is not None and known[:3] == (q_sizes, k_sizes, 0):
            low, high = form.range_within(q_sizes, k_sizes, known[3])
        else:
            low, high = form.range(q_sizes, k_sizes)
        if low < 0 or high >= rows:
            first, count = low, max(high - low + 1, 1)
    else:
        low, high = form.range(q_sizes, k_sizes)
        if low < 0 or high >= rows:
            return (
                f"the index function of Gathered leaves the table at some pairs: {low}..{high} of {rows} entries; "
                "clip=True gives those the nearest entry"
            )
    if n * count > MAX_TABLE:
        return f"Gathered needs more than {MAX_TABLE} entries per batch and head"
    return _Rows(form, q_sizes, k_sizes, first, count)


def _gathered_term(part: Gathered, problem: Problem, reach: Reach) -> Term:
    found = _gathered(part, problem, reach)
    assert not isinstance(found, str)
    form, q_sizes, k_sizes, first, count = found
    u, rows = part.U.float(), part.U.shape[3]
    if (first, count) != (0, rows):
        entries = torch.arange(first, first + count, device=u.device).clamp(0, rows - 1)
        u = u.index_select(3, entries)
    if part.side == "key" and problem.frame is not None:
        u = problem.frame.pad(u, dim=2)
    own = (count, 0) if part.side == "query" else (0, count)
    q_code, k_code = _linear_codes(q_sizes, k_sizes, form.q, form.k, *own)
    return Term(u.flatten(2).contiguous(), q_code, k_code, form.constant - first)


@constant
@lru_cache(maxsize=32)
def _linear_codes(
    q_sizes: tuple[int, ...], k_sizes: tuple[int, ...], q_form: tuple[int, ...], k_form: tuple[int, ...],
    q_pitch: int, k_pitch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _coded(q_sizes, q_form, q_pitch), _coded(k_sizes, k_form, k_pitch)


def _coded(sizes: tuple[int, ...], form: tuple[int, ...], pitch: int) -> Tensor:
    """Return pitch * id + form . coordinates of every token."""
    ids = torch.arange(math.prod(sizes))
    code = ids * pitch
    for weight, size, inner in zip(form, sizes, _pitches(sizes), strict=True):
        code = code + weight * (ids // inner % size)
    return code.int()


def _pitches(sizes: tuple[int, ...]) -> list[int]:
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _skewed_range(part: RelativeLogits, problem: Problem, reach: Reach) -> tuple[int, int, int] | str:
    """Return the shift of positions and the first and last offset that occurs, or why the part cannot be used."""
    if problem.frame is not None:
        return "RelativeLogits with phantom keys is not known to the core"
    known = reach()
    low, high = 1 - problem.n_q, problem.n_k - 1
    if known is not None and known[:3] == ((problem.n_q,), (problem.n_k,), 0):
        ((low, high),) = known[3]
    shift = part.shift(problem.n_q, problem.n_k)
    return shift, low - shift, high - shift


def _refuse_skewed(part: RelativeLogits, problem: Problem, reach: Reach) -> str | None:
    found = _skewed_range(part, problem, reach)
    if isinstance(found, str):
        return found
    _, low, high = found
    if problem.n_q * (high - low + 1) > MAX_TABLE:
        return f"RelativeLogits would need more than {MAX_TABLE} entries per batch and head"
    return None


def _skewed_term(part: RelativeLogits, problem: Problem, reach: Reach) -> Term:
    """One column per offset that occurs, those that U lacks filled with zeros: the core does not ask for limits."""
    found = _skewed_range(part, problem, reach)
    assert not isinstance(found, str)
    shift, low, high = found
    rows = high - low + 1
    table = columns(part.U.float(), part.first, low, rows)
    q_code, k_code = _linear_codes((problem.n_q,), (problem.n_k,), (-1,), (1,), rows, 0)
    return Term(table.flatten(2).contiguous(), q_code, k_code, -shift - low)


# ---- offsets ----------------------------------------------------------------------------------------------------

_OFFSET_KINDS = (RelativeTable, BucketTable, ALiBi, DistanceDecay)


class _Frame(NamedTuple):
    """On which grids an offset is counted: key coordinate - `low` - query coordinate."""

    q_sizes: tuple[int, ...]
    k_sizes: tuple[int, ...]
    low: tuple[int, ...]
    lead: int


def _frame(part: Any, problem: Problem) -> _Frame | str:
    grid, lead = getattr(part, "grid", None), getattr(part, "lead", 0)
    query_grid = getattr(part, "query_grid", None) or grid
    q_sizes = (problem.n_q,) if query_grid is None else query_grid.sizes
    k_sizes = (problem.n_k,) if grid is None else grid.sizes
    low = (0,) * len(k_sizes)
    if problem.frame is not None:
        base = problem.frame.base
        if lead or (grid is None and base.ndim > 1) or (grid is not None and grid != base):
            return (
                f"{type(part).__name__} counts keys on another grid than the pattern, which has phantom keys"
            )
        k_sizes, low = problem.frame.padded.sizes, problem.frame.low
    return _Frame(tuple(q_sizes), tuple(k_sizes), tuple(low), lead)


def _ranges(frame: _Frame, reach: Reach) -> list[tuple[int, int]]:
    """Return the offsets that occur along each axis, 0 always among them."""
    known = reach()
    if known is not None and known[:3] == (frame.q_sizes, frame.k_sizes, frame.lead):
        raw = known[3]
    else:
        raw = [(1 - n_q, n_k - 1) for n_q, n_k in zip(frame.q_sizes, frame.k_sizes, strict=True)]
    return [(min(lo - low, 0), max(hi - low, 0)) for (lo, hi), low in zip(raw, frame.low, strict=True)]


def _offset_term(part: Any, problem: Problem, reach: Reach) -> Term:
    """Ask the score for one query on a grid on which every offset that occurs is one key."""
    frame = _frame(part, problem)
    assert not isinstance(frame, str)
    ranges = _ranges(frame, reach)
    sizes = tuple(hi - lo + 1 for lo, hi in ranges)
    pitches = _pitches(sizes)
    centre = -sum(lo * pitch for (lo, _), pitch in zip(ranges, pitches, strict=True))
    if isinstance(part, ALiBi | BucketTable):
        if part.align == "end":
            centre += (problem.n_k if problem.frame is None else problem.frame.base.numel) - problem.n_q
        probe = replace(part, align="start")
    elif isinstance(part, RelativeTable):
        probe = replace(part, grid=Grid(*sizes), query_grid=None, lead=0)
    else:
        probe = replace(part, grid=Grid(*sizes), lead=0)
    n = math.prod(sizes)
    at = Pairs(torch.tensor([[[centre]]]), torch.arange(n)[None, None], n_q=n, n_k=n, dense=True)
    table = probe.values(at)[:, :, 0].float()
    base = -sum((lo + low) * pitch for (lo, _), low, pitch in zip(ranges, frame.low, pitches, strict=True))
    if frame.lead:
        table, base = torch.nn.functional.pad(table, (1, 0)), base + 1
    q_code, k_code = _offset_codes(frame.q_sizes, frame.k_sizes, tuple(pitches), frame.lead)
    return Term(table.contiguous(), q_code, k_code, base)


@constant
@lru_cache(maxsize=32)
def _offset_codes(
    q_sizes: tuple[int, ...], k_sizes: tuple[int, ...], pitches: tuple[int, ...], lead: int
) -> tuple[Tensor, Tensor]:
    nowhere = torch.full((lead,), _NOWHERE, dtype=torch.int32)
    q = _coded(q_sizes, tuple(-p for p in pitches), 0)
    k = _coded(k_sizes, pitches, 0)
    return (torch.cat([nowhere, q]), torch.cat([nowhere, k])) if lead else (q, k)
