"""Keys in banks: rows appended to k and v, each bank with its own `where`, scores and mask; one rule over all.

Pooled blocks, learned or memory tokens, additional keys, cached summaries: they all join the softmax of the keys
before them. No kernel knows about banks: they are concatenated, and `attend` is called once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.attend import attend
from foveate.kernels.checks import check_where
from foveate.kernels.merge import merge
from foveate.patterns.banks import beside
from foveate.patterns.basic import Full
from foveate.scores.after import After
from foveate.scores.banks import on_keys
from foveate.scores.base import Extent, Score, as_scores, lift
from foveate.scores.bias import KeyBias
from foveate.scores.rules import NEG_INF, Rule


@dataclass(frozen=True, eq=False)
class Bank:
    """Some keys with their values, and what is said about them alone.

    Attributes:
        k: keys `(B or 1, H_kv or 1, N, D)`; N may be 0.
        v: values `(B or 1, H_kv or 1, N, D_v)`.
        where: who sees which of these keys: a Pattern, Selection or Schedule over N_q queries and these N keys
            (`Causal()` puts query i at key N - N_q + i of the bank). None = every query sees all.
        key_bias: added to the logits of each key, broadcastable to `(B, H, N)`, with gradient: ln p makes a key
            count for p tokens.
        score: a score, or a sequence of them, of this bank's logits only, on its own key coordinates.
        mask: bool or float, broadcastable to `(B, H, N_q, N)`, as for `attend`.
    """

    k: Float[Tensor, "#b #h n d"]
    v: Float[Tensor, "#b #h n dv"]
    where: Any = None
    key_bias: Float[Tensor, "..."] | None = None
    score: Score | Sequence[Score] | None = None
    mask: Tensor | None = None


class Joined(NamedTuple):
    """All banks as keyword arguments of `attend` and `explain`: `explain(q, **join_banks(banks, n)._asdict())`."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n dv"]
    where: Any
    score: tuple[Score, ...]
    mask: Tensor | None


def join_banks(banks: Sequence[Bank], n_q: int) -> Joined:
    """Concatenate banks along the keys.

    Banks that every query sees come first, then the others, in the given order: a bank with a closed form keeps it
    behind keys that all see, and the order of keys changes nothing else.

    Args:
        banks: one or more, equal in head sizes; batch and key heads broadcast.
        n_q: number of queries.

    Raises:
        ArgumentError: naming `banks[i]`, by its number in the given order.
    """
    if not banks or not all(isinstance(bank, Bank) for bank in banks):
        raise bad("banks", banks, "one Bank or more")
    b, h = _leading(banks)
    sizes = [bank.k.shape[2] for bank in banks]
    for i, bank in enumerate(banks):
        _check(bank, f"banks[{i}]", n_q)
    order = sorted((i for i in range(len(banks)) if sizes[i]), key=lambda i: not _seen_by_all(banks[i])) or [
        0
    ]
    kept, sizes = [banks[i] for i in order], [sizes[i] for i in order]
    if len(kept) == 1:
        where = kept[0].where if sizes[0] else None
    elif all(_seen_by_all(bank) for bank in kept):
        where = None
    else:
        where = beside([(bank.where, n) for bank, n in zip(kept, sizes, strict=True)], n_q)
    return Joined(
        torch.cat([bank.k.expand(b, h, -1, -1) for bank in kept], dim=2),
        torch.cat([bank.v.expand(b, h, -1, -1) for bank in kept], dim=2),
        where,
        _scores(kept, sizes),
        _masks(kept, sizes),
    )


def attend_banks(
    q: Float[Tensor, "#b h n_q d"],
    banks: Sequence[Bank],
    *,
    score: Score | Iterable[Score] | None = None,
    weigh: Rule | None = None,
    after: After | Iterable[After] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attend to the keys of several banks under one rule: one softmax over all of them.

    Args:
        q: queries.
        banks: the keys, see `Bank`.
        score: scores of the logits of all banks, after those of each bank: row factors, soft-caps, whatever does
            not look at key coordinates. What does belongs to its bank, `Bank(score=...)`.
        weigh, after, scale, backend, return_lse: as for `attend`; maps in `after` see the keys as `join_banks`
            orders them.

    Returns:
        What `attend` returns.

    Raises:
        ArgumentError: naming what does not fit.
    """
    joined = join_banks(banks, q.shape[2])
    scores = (*joined.score, *as_scores(score))
    return attend(
        q, joined.k, joined.v, where=joined.where, score=scores, weigh=weigh, after=after, mask=joined.mask,
        scale=scale, backend=backend, return_lse=return_lse,
    )  # fmt: skip


def attend_groups(
    q: Float[Tensor, "#b h n_q d"],
    groups: Sequence[Sequence[Bank]],
    *,
    score: Score | Iterable[Score] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b h n_q dv"]:
    """Attend to the banks of all groups under one softmax, group by group, merged by log-sum-exp.

    The result is that of `attend_banks` over all of them. A group is worth it where its banks want other query
    tiles than the rest: rows and columns of a map in one cell would make it see both for all of its queries.

    Args:
        q: queries.
        groups: banks that are attended to together.
        score, scale, backend: as for `attend_banks`.

    Raises:
        ArgumentError: naming what does not fit.
    """
    if len(groups) == 1:
        return attend_banks(q, groups[0], score=score, scale=scale, backend=backend)
    parts = [attend_banks(q, g, score=score, scale=scale, backend=backend, return_lse=True) for g in groups]
    return merge([out for out, _ in parts], [lse for _, lse in parts])[0]


def _seen_by_all(bank: Bank) -> bool:
    return bank.where is None or isinstance(bank.where, Full)


def _leading(banks: Sequence[Bank]) -> tuple[int, int]:
    """Return the batch and the key heads that all banks broadcast to."""
    for i, bank in enumerate(banks):
        for name, x in (("k", bank.k), ("v", bank.v)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                raise bad(f"banks[{i}].{name}", getattr(x, "shape", x), "a tensor (B, H_kv, N, D)")
        if bank.k.shape[2] != bank.v.shape[2]:
            raise bad(f"banks[{i}].v", tuple(bank.v.shape), f"{bank.k.shape[2]} rows, one per key")
    found = []
    for axis, name in ((0, "batches"), (1, "key heads")):
        shown = [x.shape[axis] for bank in banks for x in (bank.k, bank.v)]
        if len(set(shown) - {1}) > 1:
            raise bad("banks", shown, f"equal numbers of {name}, or 1 to broadcast")
        found.append(next(iter(set(shown) - {1}), 1))
    for name in ("k", "v"):
        widths = [getattr(bank, name).shape[3] for bank in banks]
        if len(set(widths)) > 1:
            raise bad("banks", widths, f"one head size of all {name}")
    return found[0], found[1]


def _check(bank: Bank, name: str, n_q: int) -> None:
    n = bank.k.shape[2]
    for what, x in (("key_bias", bank.key_bias), ("mask", bank.mask)):
        if x is not None and (not isinstance(x, Tensor) or x.ndim == 0 or x.shape[-1] not in (1, n)):
            got = tuple(x.shape) if isinstance(x, Tensor) else x
            raise bad(f"{name}.{what}", got, f"a tensor that broadcasts over {n} keys on its last axis")
    where = bank.where
    if where is None or not n:
        return
    leading = getattr(where, "leading", None) or getattr(where, "batch", None) or (1, 1)
    try:
        check_where(where, Extent(leading[0], leading[1], n_q, n))
    except ValueError as error:
        raise bad(
            f"{name}.where", where, f"cells or a pattern for {n_q} queries and {n} keys", str(error)
        ) from None


def _scores(banks: Sequence[Bank], sizes: Sequence[int]) -> tuple[Score, ...]:
    """Lift the scores of each bank, and join the key biases to one."""
    scores: list[Score] = []
    first = 0
    for bank, n in zip(banks, sizes, strict=True):
        own = as_scores(bank.score)
        scores += own if len(banks) == 1 else [on_keys(part, first, n) for part in own]
        first += n
    given = [bank.key_bias for bank in banks if bank.key_bias is not None]
    if given:
        b, h = (max(lift(x, 3).shape[axis] for x in given) for axis in (0, 1))
        biases = []
        for bank, n in zip(banks, sizes, strict=True):
            x = given[0].new_zeros(1) if bank.key_bias is None else bank.key_bias
            biases.append(lift(x, 3).expand(b, h, n))
        scores.append(KeyBias(torch.cat(biases, dim=-1)))
    return tuple(scores)


def _masks(banks: Sequence[Bank], sizes: Sequence[int]) -> Tensor | None:
    given = [lift(bank.mask, 4) for bank in banks if bank.mask is not None]
    if not given:
        return None
    floats = next((x.dtype for x in given if x.is_floating_point()), None)
    b, h, n_q = (max(x.shape[axis] for x in given) for axis in (0, 1, 2))
    parts = []
    for bank, n in zip(banks, sizes, strict=True):
        mask = given[0].new_ones(1, dtype=torch.bool) if bank.mask is None else bank.mask
        if floats is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=floats).masked_fill(~mask, NEG_INF)
        parts.append(lift(mask, 4).expand(b, h, n_q, n))
    return torch.cat(parts, dim=-1)
