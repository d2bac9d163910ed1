"""What one call of `scan` means: the recurrence, the shapes, and the record every form computes from.

Per head, with a state S of shape (D_k, D_v) and a log decay g_t <= 0 (a number, or one per key channel):

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          the decay acts on the old state, before the new pair enters
    o_t = scale * q_t S_t                       hence o_t includes the pair of its own token, undecayed

the same sum as the quadratic form o_i = scale * sum_{j<=i} (q_i * exp(g_{j+1} + ... + g_i)) . k_j v_j.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.dtypes import FLOATS, accumulation_dtype
from foveate.core.errors import bad


@dataclass(frozen=True)
class ScanProblem:
    """One validated call, ready for any form of the scan.

    Attributes:
        q: (B, H, N, D_k) in the accumulation dtype, already multiplied by the scale.
        k: (B, H, N, D_k) in the accumulation dtype, key heads repeated to H.
        v: (B, H, N, D_v) likewise.
        decay: log decay (B|1, H|1, N|1, D_k|1), or None. One step (size 1) holds for every token,
            one channel for every channel.
        state: (B, H, D_k, D_v), the state before the first token; zeros when the caller gave none.
        segments: (B|1, N) integer ids not yet folded into `decay`, or None.
        inclusive: whether token i sees its own pair (k_i, v_i).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    state: Tensor
    segments: Tensor | None = None
    inclusive: bool = True

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.q.shape[2]

    def reversed(self) -> ScanProblem:
        """The same problem read from the last token to the first."""
        decay, segments = self.decay, self.segments
        return replace(
            self,
            q=self.q.flip(2),
            k=self.k.flip(2),
            v=self.v.flip(2),
            decay=decay if decay is None or decay.shape[2] == 1 else decay.flip(2),
            segments=None if segments is None else segments.flip(1),
        )

    def exclusive(self) -> ScanProblem:
        """The same problem without each token's own pair in its output."""
        return replace(self, inclusive=False)

    def folded(self) -> ScanProblem:
        """The same problem with segments turned into full resets (log decay -inf) and empty keys."""
        if self.segments is None:
            return self
        resets, padding = segment_resets(self.segments)
        here, gone = resets[:, None, :, None], padding[:, None, :, None]
        decay = self.q.new_zeros(()) if self.decay is None else self.decay
        # Padding must leave the state alone, so that trailing padding does not age the final state.
        decay = torch.where(here, -torch.inf, torch.where(gone, 0.0, decay))
        return replace(
            self, decay=decay, k=self.k.masked_fill(gone, 0.0), v=self.v.masked_fill(gone, 0.0), segments=None
        )


def segment_resets(segments: Int[Tensor, "b n"]) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Return where a new sequence starts, and where there is only padding (negative ids).

    Padding is looked through: a sequence continues after it if the id is still the same. The first
    sequence starts without a reset, so that it inherits the initial state.
    """
    n = segments.shape[1]
    padding = segments < 0
    index = torch.arange(n, device=segments.device).expand_as(segments)
    last = torch.where(padding, -1, index).cummax(1).values if n else index
    before = torch.cat([last.new_full(last[:, :1].shape, -1), last[:, :-1]], dim=1)
    previous = segments.gather(1, before.clamp(min=0))
    return (before >= 0) & ~padding & (previous != segments), padding


def prepare(
    q: Float[Tensor, "b h n dk"],
    k: Float[Tensor, "b hkv n dk"],
    v: Float[Tensor, "b hkv n dv"],
    decay: Tensor | float | None,
    scale: float,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> ScanProblem:
    """Validate one call and bring it to the accumulation dtype (float32, or float64 for float64).

    Raises:
        ArgumentError: naming the argument whose rank, shape, dtype, device or values cannot be right.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise bad(name, tuple(x.shape), "4 axes (batch, heads, tokens, channels)")
        if x.dtype not in FLOATS:
            raise bad(name, x.dtype, "a floating point dtype", "Convert it with .float() first.")
        if x.device != q.device:
            raise bad(name, str(x.device), f"the device of q, {q.device}", "Move the tensors together.")
    b, h, _, dk = q.shape
    _check_kv(q, k, v)
    if len({q.dtype, k.dtype, v.dtype}) > 1 and not torch.is_autocast_enabled(q.device.type):
        got = tuple(str(x.dtype) for x in (q, k, v))
        raise bad("q, k, v", got, "one dtype", "Cast them to the same dtype, or use autocast.")
    dtype = accumulation_dtype(torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype))
    state = _state(initial_state, (b, h, dk, v.shape[-1]), q, dtype)
    if segments is not None:
        check_segments(segments, q)
    repeat = h // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    return ScanProblem(
        q=q.to(dtype) if scale == 1.0 else q.to(dtype) * scale,
        k=k.to(dtype),
        v=v.to(dtype),
        decay=_decay(decay, q, dtype),
        state=state,
        segments=segments,
    )


def _check_kv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare batch, heads, tokens and channels of q, k and v."""
    b, h, n, dk = q.shape
    if k.shape[0] != b or k.shape[2] != n or k.shape[3] != dk:
        raise bad("k", tuple(k.shape), f"({b}, heads, {n}, {dk}) to go with q {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise bad("v", tuple(v.shape), f"{(*k.shape[:3], 'D_v')} to go with k {tuple(k.shape)}")
    if k.shape[1] == 0 or h % k.shape[1]:
        raise bad("k", tuple(k.shape), f"a number of heads that divides the {h} heads of q")


def check_segments(segments: Tensor, q: Tensor) -> None:
    """Segments are integers, one per token, on q's device."""
    b, _, n, _ = q.shape
    if segments.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise bad("segments", segments.dtype, "signed integer ids", "Negative ids mark padding.")
    if segments.ndim != 2 or segments.shape[0] not in (1, b) or segments.shape[1] != n:
        raise bad("segments", tuple(segments.shape), f"({b}, {n}): one id per token")
    if segments.device != q.device:
        raise bad("segments", str(segments.device), f"the device of q, {q.device}")


def _state(initial: Tensor | None, shape: tuple[int, ...], q: Tensor, dtype: torch.dtype) -> Tensor:
    """The state before the first token, checked, in the accumulation dtype."""
    if initial is None:
        return torch.zeros(shape, dtype=dtype, device=q.device)
    if tuple(initial.shape) != shape:
        raise bad("initial_state", tuple(initial.shape), f"{shape}: (batch, heads of q, D_k, D_v)")
    if not initial.is_floating_point():
        raise bad("initial_state", initial.dtype, "a floating point dtype")
    if initial.device != q.device:
        raise bad("initial_state", str(initial.device), f"the device of q, {q.device}")
    return initial.to(dtype)


def _decay(decay: Tensor | float | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The log decay as (B|1, H|1, N|1, D_k|1), checked, in the accumulation dtype."""
    if decay is None:
        return None
    b, h, n, dk = q.shape
    if not isinstance(decay, Tensor):
        decay = torch.tensor(float(decay), dtype=dtype, device=q.device)
    if not decay.is_floating_point():
        raise bad("decay", decay.dtype, "a floating point log decay")
    if decay.device != q.device:
        raise bad("decay", str(decay.device), f"the device of q, {q.device}")
    given = tuple(decay.shape)
    forms = f"(H,) = ({h},), (B, H, N) = ({b}, {h}, {n}) or (B, H, N, D_k) = ({b}, {h}, {n}, {dk})"
    if decay.ndim == 0:
        decay = decay.reshape(1, 1, 1, 1)
    elif decay.ndim == 1:
        decay = decay.reshape(1, -1, 1, 1)
    elif decay.ndim == 3:
        decay = decay.unsqueeze(-1)
    elif decay.ndim != 4:
        raise bad("decay", given, f"a number, or a tensor {forms}")
    if any(got not in (1, want) for got, want in zip(decay.shape, (b, h, n, dk), strict=True)):
        raise bad("decay", given, forms, "Axes of size 1 are repeated.")
    if seen(decay > 0):
        raise bad(
            "decay", float(decay.max()), "log decays <= 0", "Pass log(a) for a decay factor a in [0, 1]."
        )
    return decay.to(dtype)


def seen(wrong: Bool[Tensor, "..."]) -> bool:
    """Whether any flag is set, as far as one may look.

    Looking at values would stall an accelerator, and can be neither traced nor mapped over (vmap); there
    the caller is trusted.
    """
    if wrong.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return bool(wrong.any())
    except RuntimeError:
        return False


def unrounded(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast, under which every product would be rounded to half precision; the contract is float32."""
    # Shapes alone have no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device_type=device.type, enabled=False)
