"""Attention Is Not All You Need Anymore. arXiv 2308.07661, 2023.

A family of causal token mixers without scores, the Extractors. Predicting the next token is split in an extraction,
a sum over the past whose weights depend on the distance alone, and an adjustment of the result by the present token.
Four members trade parameters for quality: the super high-performance (SHE), the higher-performance (HE), the
worthwhile (WE) and the minimalist Extractor (ME).

    e_t = sum_{i = 0}^{l - 1} v_{t - i} W_i       (B, N, C), nothing before the first token
    a_t = x_t W_adj + b_adj                       (B, N, C)
    out_t = (e_t * a_t) W_out + b_out             (B, N, C), elementwise product
    she: v = x,               W_i a matrix (C, C)        l C^2 weights
    he:  v = x W_in + b_in,   W_i a vector (C,)          l C
    we:  v = x W_in + b_in,   W_i a number               l
    me:  v = x,               W_i a number, out = e      l

This is a reconstruction: the paper's text and code were not at hand. That there are four of them, that they read
the past by distance and adjust by the present, what they cost relative to each other and that they decode from a
window of fixed length follow the abstract and summaries; which weights are matrices, vectors or numbers, where
projections and biases stand, and the initial values are ours. No result of the paper should be expected of it.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.fir import FIRForm, causal_fir
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import Decodes

Variant = Literal["she", "he", "we", "me"]


class Window(NamedTuple):
    """What decoding keeps: the latest l - 1 extracted inputs, zeros where there was none. Always of this size."""

    inputs: Float[Tensor, "b lags c"]


@system(
    key="extractors",
    title="Attention Is Not All You Need Anymore",
    arxiv="2308.07661",
    year=2023,
    family="linear",
    role="module",
    cost="O(N log N C + N C^2), she O(N C^2 l) or by FFT O(N C^2 + C^2 l log l)",
    fidelity="reconstruction",
    primitive="own (a convolution with weights per distance, no attention logits)",
    causal="always",
    limits="Reconstructed. Always causal, row-major on a grid; sees the latest `length` tokens, fixed in advance.",
)
class Extractor(Decodes, nn.Module):
    """Sum over the past with weights per distance, adjusted by the present token.

    Args:
        dim: channels C.
        length: how many tokens l, the present one included, the sum reaches over.
        variant: "she", "he", "we" or "me".
        form: of `causal_fir`: "auto", "direct" or "fft".

    Raises:
        ArgumentError: naming `dim`, `length` or `variant`.
    """

    def __init__(self, *, dim: int, length: int, variant: Variant = "he", form: FIRForm = "auto"):
        super().__init__()
        check_heads(dim, 1)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise bad("length", length, "a positive number of tokens")
        if variant not in get_args(Variant):
            raise bad("variant", variant, f"one of {get_args(Variant)}")
        self.dim, self.length = dim, length
        self.variant: Variant = variant
        self.form: FIRForm = form
        shape = {"she": (length, dim, dim), "he": (length, dim), "we": (length,), "me": (length,)}[variant]
        self.taps = nn.Parameter(torch.empty(shape))
        projects, adjusts = variant in ("he", "we"), variant != "me"
        self.value = nn.Linear(dim, dim) if projects else None
        self.adjust = nn.Linear(dim, dim) if adjusts else None
        self.proj = nn.Linear(dim, dim) if adjusts else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw taps that keep the variance of the input, and let the adjustment start around 1."""
        terms = self.length * (self.dim if self.variant == "she" else 1)
        nn.init.normal_(self.taps, std=1 / math.sqrt(terms))
        if self.adjust is not None:
            nn.init.ones_(self.adjust.bias)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "Extractor":
        """Return the HE, reaching over all tokens of `grid`; causal in either case. There are no heads.

        Raises:
            ArgumentError: naming `dim` or `heads`, which must divide `dim` as it must for all that have heads.
        """
        check_heads(dim, heads)
        return cls(dim=dim, length=grid.numel)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix every token of `grid` with those before it.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.prefill(x)[0]

    def extract(
        self, x: Float[Tensor, "b n c"], past: Window | None = None
    ) -> tuple[Float[Tensor, "b n c"], Window]:
        """Return the extraction e alone, linear in x but for the bias of the input projection, and the new past."""
        v = x if self.value is None else self.value(x)
        before = v.new_zeros(v.shape[0], self.length - 1, self.dim) if past is None else past.inputs
        expected = (v.shape[0], self.length - 1, self.dim)
        if before.shape != expected:
            raise bad(
                "past", tuple(before.shape), f"a Window of {expected}", "It is the second result of prefill."
            )
        # Without a past the filter need not read zeros.
        out = causal_fir(v, self.taps, before=None if past is None else before, form=self.form)
        kept = torch.cat([before, v], dim=1)
        return out, Window(kept[:, kept.shape[1] - self.length + 1 :])

    def prefill(
        self, x: Float[Tensor, "b n c"], past: Window | None = None
    ) -> tuple[Float[Tensor, "b n c"], Window]:
        """Mix a stretch of tokens that follows what `past` has seen, and return the new past too.

        Raises:
            ArgumentError: naming `past`.
        """
        out, past = self.extract(x, past)
        if self.adjust is not None and self.proj is not None:
            out = self.proj(out * self.adjust(x))
        return out, past

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, length={self.length}, variant={self.variant!r}, form={self.form!r}"
