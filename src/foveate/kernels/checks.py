"""The checks of `attend`'s arguments: each returns what it checked in its usual form, or raises and names it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource]

from foveate.core.dtypes import FLOATS
from foveate.core.errors import ArgumentError, bad
from foveate.scores.base import Extent, Part, lift

Input = Tensor | Sequence[int]


def as_tensor(x: Input, name: str, dtype: torch.dtype, bare: bool) -> Tensor:
    """Return a tensor as it is, a bare shape as a meta tensor of `dtype`."""
    if isinstance(x, Tensor):
        return x
    if bare and isinstance(x, (tuple, list, torch.Size)) and all(isinstance(s, int) for s in x):
        return torch.empty(tuple(x), dtype=dtype, device="meta")
    raise bad(name, x, "a tensor (B, H, N, D)" if not bare else "a tensor or a shape (B, H, N, D)")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check the three tensors against each other and return the batch size."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            hint = "Put the missing dimensions in with x[None]." if x.ndim < 4 else "Flatten the grid into N."
            raise bad(name, tuple(x.shape), "4 dimensions (B, H, N, D)", hint)
        if x.dtype not in FLOATS:
            hint = "Convert it with .float() or the dtype of your model."
            raise bad(f"{name}.dtype", x.dtype, "float16, bfloat16, float32 or float64", hint)
        if x.dtype != q.dtype:
            raise bad(f"{name}.dtype", x.dtype, f"{q.dtype}, the dtype of q", f"Use {name}.to(q.dtype).")
        if x.device != q.device:
            hint = f"Move it with {name}.to(q.device)."
            raise bad(f"{name}.device", str(x.device), f"{q.device}, the device of q", hint)
    if q.shape[-1] == 0:
        raise bad("q", tuple(q.shape), "a head size of at least 1")
    if k.shape[-1] != q.shape[-1]:
        raise bad("k", tuple(k.shape), f"head size {q.shape[-1]}, that of q")
    if v.shape[2] != k.shape[2]:
        raise bad("v", tuple(v.shape), f"{k.shape[2]} rows, one per key")
    if v.shape[1] != k.shape[1]:
        raise bad("v", tuple(v.shape), f"{k.shape[1]} heads, as k has")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        hint = "Each key head serves the same number of query heads."
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {heads} heads of q", hint)
    sizes = {x.shape[0] for x in (q, k, v)}
    if len(sizes - {1}) > 1:
        shown = tuple(x.shape[0] for x in (q, k, v))
        raise bad("batch of q, k, v", shown, "equal sizes, or 1 to broadcast")
    return next(iter(sizes - {1}), 1)


def check_part(argument: str, part: Part, extent: Extent, device: torch.device) -> None:
    """Raise unless a score, rule or after-value fits the sizes and lies on the device."""
    try:
        part.check(extent)
    except ArgumentError as error:
        raise ArgumentError(f"{argument}: {error}") from None
    for name, tensor in part.tensors().items():
        if tensor.device != device:
            got = f"{type(part).__name__}.{name} on {tensor.device}"
            raise bad(argument, got, f"tensors on {device}, the device of q")


def check_mask(mask: Any, extent: Extent, device: torch.device) -> Tensor | None:
    """Return the mask with 4 dimensions, or raise an ArgumentError naming `mask`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        hint = "Patterns and Selections go to where=."
        raise bad("mask", mask, "a bool or float tensor", hint)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise bad(
            "mask", mask.dtype, "a bool tensor (True = may attend) or a float tensor (added to the logits)"
        )
    if mask.device != device:
        raise bad("mask", f"a tensor on {mask.device}", f"one on {device}, the device of q")
    shape, sizes = tuple(mask.shape), tuple(extent)
    fits = len(shape) <= 4 and all(
        s in (1, size) for s, size in zip(reversed(shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise bad("mask", shape, f"a shape that broadcasts to (B, H, N_q, N_k) = {sizes}")
    if mask.is_floating_point() and _can_look(mask) and bool(torch.isnan(mask).any()):
        hint = "Use -inf where a pair may not attend, or a bool mask."
        raise bad("mask", "NaN entries", "a float mask without NaN", hint)
    return lift(mask, 4)


def _can_look(x: Tensor) -> bool:
    """Whether reading the values is free: on the CPU, not while tracing, not under a functorch transform."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(x)


def check_where(where: Any, extent: Extent) -> None:
    """Raise an ArgumentError naming `where` unless it is one and fits the lengths."""
    if where is None:
        return
    if isinstance(where, Tensor):
        hint = "Pass a tensor as mask=, or wrap a static one in Explicit(mask)."
        raise bad("where", f"Tensor{tuple(where.shape)}", "a Pattern, Selection or Schedule", hint)
    if isinstance(where, type) or not (hasattr(where, "dense") or hasattr(where, "groups")):
        raise bad("where", where, "a Pattern, Selection or Schedule instance")
    if hasattr(where, "check"):
        where.check(extent.n_q, extent.n_k)
    elif hasattr(where, "n_q") and (where.n_q, where.n_k) != (extent.n_q, extent.n_k):
        raise bad("where", (where.n_q, where.n_k), f"(N_q, N_k) = {(extent.n_q, extent.n_k)}")
    told_apart = getattr(where, "leading", None) or getattr(where, "batch", None)
    if told_apart is not None and not all(
        a in (1, b) for a, b in zip(told_apart, (extent.batch, extent.heads), strict=True)
    ):
        expected = f"cells for (1 or {extent.batch}, 1 or {extent.heads}) batch elements and heads"
        raise bad("where", tuple(told_apart), expected)


def check_scale(scale: Any, d: int) -> float:
    """Return the factor on the logits, 1 / sqrt(d) for None."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    if isinstance(scale, (Tensor, bool)) or not isinstance(scale, numbers.Real):
        hint = (
            "A learned or per-head temperature is score=RowFactor(...)." if isinstance(scale, Tensor) else ""
        )
        shown = f"Tensor{tuple(scale.shape)}" if isinstance(scale, Tensor) else scale
        raise bad("scale", shown, "a number", hint)
    return float(scale)
