"""`causal_fir`: weighted sums over the latest inputs with weights per lag, directly or by FFT.

out[t] = sum_{i = 0}^{L - 1} x[t - i] * taps[i]: a finite impulse response filter. Taps are numbers, vectors (one
filter per channel) or matrices (channels mix at every lag). Weights depend on the distance alone, so that shifting
the input shifts the output, and the L - 1 inputs before a token are all that decoding has to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad

FIRForm = Literal["auto", "direct", "fft"]


def causal_fir(
    x: Float[Tensor, "b n c"],
    taps: Float[Tensor, "lags"] | Float[Tensor, "lags c"] | Float[Tensor, "lags c c_out"],
    *,
    before: Float[Tensor, "b m c"] | None = None,
    form: FIRForm = "auto",
) -> Float[Tensor, "b n c_out"]:
    """Filter a sequence along its tokens.

    Args:
        x: the sequence.
        taps: weights from lag 0 (the token itself) on: (L,), (L, C) or (L, C, C_out).
        before: inputs that came before `x`, oldest first; zeros otherwise. Only the last L - 1 matter.
        form: "direct" multiplies out, O(N L C) or O(N L C C_out); "fft" needs O((N + L) log(N + L) C), with
            matrices also (N + L) C C_out; "auto" takes the one with fewer multiplications.

    Returns:
        (B, N, C_out) in the dtype of `x`; summed in float32 or wider by "fft".

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    if x.ndim != 3:
        raise bad("x", tuple(x.shape), "3 axes (batch, tokens, channels)")
    b, n, c = x.shape
    if not 1 <= taps.ndim <= 3 or not taps.shape[0] or (taps.ndim > 1 and taps.shape[1] != c):
        raise bad("taps", tuple(taps.shape), f"(L,), (L, {c}) or (L, {c}, C_out), L > 0")
    if form not in get_args(FIRForm):
        raise bad("form", form, f"one of {get_args(FIRForm)}")
    reach = taps.shape[0] - 1
    if before is not None:
        if before.ndim != 3 or before.shape[0] != b or before.shape[2] != c:
            raise bad("before", tuple(before.shape), f"({b}, tokens, {c}) like x")
        before = before[:, max(0, before.shape[1] - reach) :]
        x = torch.cat([before, x], dim=1)
    length = x.shape[1]
    taps = taps[:length]  # lags beyond the first input meet nothing
    if not x.numel():  # transforms refuse to be empty
        return x.new_zeros(b, n, taps.shape[2] if taps.ndim == 3 else c)
    if form == "auto":
        form = choose_form(length, c, taps.shape)
    out = _by_fft(x, taps) if form == "fft" else _directly(x, taps)
    return out[:, length - n :]


def choose_form(n: int, c: int, taps: Sequence[int]) -> Literal["direct", "fft"]:
    """Return the form with fewer multiplications for one sequence of N tokens, C channels and this shape of taps.

    A complex product counts as three real ones, a real transform of m numbers as m log2 m.
    """
    m = transform_length(n, taps[0])
    pairs = c * taps[2] if len(taps) == 3 else c
    filters = pairs if len(taps) > 1 else 1
    outputs = taps[2] if len(taps) == 3 else c
    fft = (c + filters + outputs) * m * (m.bit_length() - 1) + 3 * (m // 2 + 1) * pairs
    return "fft" if fft < n * taps[0] * pairs else "direct"


def transform_length(n: int, lags: int) -> int:
    """Return a length at which nothing wraps around: the next power of two."""
    return 1 << max(0, n + lags - 2).bit_length()


def _directly(x: Tensor, taps: Tensor) -> Tensor:
    """A convolution of torch with the taps reversed, which correlates."""
    c = x.shape[2]
    padded = functional.pad(x.transpose(1, 2), (taps.shape[0] - 1, 0))
    if taps.ndim == 3:
        return functional.conv1d(padded, taps.flip(0).permute(2, 1, 0)).transpose(1, 2)
    if taps.ndim == 1:  # one filter for all: channels become samples
        lines = functional.conv1d(padded.flatten(0, 1).unsqueeze(1), taps.flip(0)[None, None])
        return lines.unflatten(0, (-1, c)).squeeze(2).transpose(1, 2)
    return functional.conv1d(padded, taps.flip(0).T.unsqueeze(1), groups=c).transpose(1, 2)


def _by_fft(x: Tensor, taps: Tensor) -> Tensor:
    n, wide = x.shape[1], accumulation_dtype(x.dtype)
    size = transform_length(n, taps.shape[0])
    spectrum = torch.fft.rfft(x.to(wide), size, dim=1)
    weights = torch.fft.rfft(taps.to(wide), size, dim=0)
    if taps.ndim == 3:
        mixed = torch.einsum("bfc,fcd->bfd", spectrum, weights)
    else:
        mixed = spectrum * (weights if taps.ndim == 2 else weights.unsqueeze(-1))
    return torch.fft.irfft(mixed, size, dim=1)[:, :n].to(x.dtype)
