"""Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities.

arXiv 2401.11143, 2024. Activations are weighed by how usual they are: along one axis (tokens, or channels) each
entry is standardised, and a product of K Gaussians with learned offsets and widths says how much of it passes. There
are no queries and keys, and nothing is summed over the axis: entries meet in their mean and variance only. With x
cut into contiguous chunks along the axis, one per head, and i over the K Gaussians of a head:

    y_i = (x - mean - delta_i) / sqrt(var + eps)             like x; mean, var (unbiased) over the chunk
    w   = prod_i exp(-y_i^2 / (2 c_i^2)) / sum over the chunk of the same
    out = w x                                                like x; each chunk's weights sum to one

A product of Gaussians is a Gaussian again: K of them change how a head trains, not what it can express, and the
factors 1 / (c sqrt(2 pi)) cancel. So w is a softmax of -sum_i y_i^2 / (2 c_i^2), which cannot underflow; the authors
divide by max(sum, eps) instead, and their weights vanish far from all Gaussians (`official=True`). Their padding
counts as zeros in mean and variance and as an entry in the sum; ours is left out of all three. `GaussianBlock` adds
x to each layer's output, as published; what stands around it (a pretrained encoder, a classifier) is not here.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.patterns.pattern import check_int

Over = Literal["tokens", "channels"]
_AXES = {"tokens": 1, "channels": 2}


class GaussianHeads(nn.Module):
    """Weigh the entries of any tensor along one of its axes.

    Args:
        axis: the axis that is cut into heads and normalised over; negative ones count from the end.
        heads: chunks of floor(size / heads) entries; the last one takes what is left over too.
        gaussians: K, per head.
        padding: entries of this value pass unchanged and count for nothing. None = no padding.
        eps: added to the variance.
        official: the authors' padding and division, see the module's text.

    Raises:
        ArgumentError: naming `heads`, `gaussians` or `eps`.
    """

    def __init__(
        self,
        *,
        axis: int,
        heads: int = 4,
        gaussians: int = 5,
        padding: float | None = None,
        eps: float = 1e-8,
        official: bool = False,
    ):
        super().__init__()
        if not eps > 0:
            raise bad("eps", eps, "a positive number")
        self.axis, self.heads = axis, check_int(heads, "heads", 1)
        self.padding, self.eps, self.official = padding, eps, official
        self.offsets = nn.Parameter(torch.zeros(heads, check_int(gaussians, "gaussians", 1)))
        self.widths = nn.Parameter(torch.randn(heads, gaussians).exp())

    def weights(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return w, in float32 (float64 for float64).

        Raises:
            ArgumentError: naming `x`, when the axis is missing or shorter than there are heads.
        """
        if not -x.ndim <= self.axis < x.ndim:
            raise bad("x", tuple(x.shape), f"a tensor with an axis {self.axis}")
        size = x.shape[self.axis]
        if size < self.heads:
            hint = "Every head takes one entry at least."
            raise bad("x", tuple(x.shape), f"{self.heads} entries or more along axis {self.axis}", hint)
        share = size // self.heads
        parts = x.split([share] * (self.heads - 1) + [size - share * (self.heads - 1)], dim=self.axis)
        made = zip(parts, self.offsets, self.widths, strict=True)
        return torch.cat([self._chunk(*each) for each in made], dim=self.axis)

    def _chunk(self, x: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
        present = None if self.padding is None else x != self.padding
        x, offsets, widths = (t.to(accumulation_dtype(x.dtype)) for t in (x, offsets, widths))
        over = {"dim": self.axis, "keepdim": True}
        if self.official:
            seen = x if present is None else torch.where(present, x, 0.0)
            mean, var = seen.mean(**over), seen.var(**over)
        else:
            there = torch.ones_like(x, dtype=torch.bool) if present is None else present
            count = there.sum(**over)
            mean = torch.where(there, x, 0.0).sum(**over) / count.clamp(min=1)
            var = torch.where(there, x - mean, 0.0).square().sum(**over) / (count - 1).clamp(min=1)
        y = (x - mean).unsqueeze(-1) - offsets
        exponent = -(y.square() / (2 * widths.square())).sum(-1) / (var + self.eps)
        if self.official:
            product = (exponent - 0.5 * (2 * torch.pi * widths.square()).log().sum()).exp()
            return product / product.sum(**over).clamp(min=self.eps)
        if present is None:
            return exponent.softmax(self.axis)
        # -inf everywhere would make NaN of a chunk that is padding alone; its weights are not used.
        exponent = exponent.masked_fill(~present, torch.finfo(exponent.dtype).min)
        return exponent.softmax(self.axis).masked_fill(~present, 0.0)

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return `w x`, and x itself at padding."""
        out = (x * self.weights(x)).to(x.dtype)
        return out if self.padding is None else torch.where(x != self.padding, out, x)

    def extra_repr(self) -> str:
        """Show the options."""
        heads, gaussians = self.offsets.shape
        return f"axis={self.axis}, heads={heads}, gaussians={gaussians}, padding={self.padding}"


class GaussianBlock(nn.Module):
    """Layers of `GaussianHeads`, each with its input added.

    Args:
        axes: the axis of each layer.
        heads: heads of each layer.
        gaussians: Gaussians of each layer.
        padding, eps, official: as in `GaussianHeads`.

    Raises:
        ArgumentError: naming `heads` or `gaussians`, unless there is one per axis.
    """

    def __init__(
        self,
        *,
        axes: Sequence[int] = (1, 1, 1),
        heads: Sequence[int] = (4, 4, 4),
        gaussians: Sequence[int] = (5, 5, 5),
        padding: float | None = None,
        eps: float = 1e-8,
        official: bool = False,
    ):
        super().__init__()
        for name, values in (("heads", heads), ("gaussians", gaussians)):
            if len(values) != len(axes):
                raise bad(name, tuple(values), f"{len(axes)} numbers, one per layer")
        options = {"padding": padding, "eps": eps, "official": official}
        self.layers = nn.ModuleList(
            GaussianHeads(axis=axis, heads=h, gaussians=k, **options)
            for axis, h, k in zip(axes, heads, gaussians, strict=True)
        )

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return x after all layers."""
        for layer in self.layers:
            x = layer(x) + x
        return x


def importance(weights: Float[Tensor, "n *rest"]) -> Float[Tensor, "*rest"]:
    """Return the paper's importance factor: weights averaged over the first axis (samples), scaled to 0 .. 1."""
    mean = weights.mean(0)
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


@system(
    key="gaussian_adaptive_attention",
    title="Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple "
    "Modalities",
    arxiv="2401.11143",
    year=2024,
    family="scored",
    role="gate",
    cost="O(N C K)",
    fidelity="vectors",
    primitive="own (weights are a density of each entry alone: no queries, keys or sums over tokens)",
    sizes="at least as many tokens as heads",
    limits="Tokens meet in their mean and variance only: nothing is carried from one token to another, and the "
    "output shrinks with the number of tokens, whose weights sum to one.",
)
class GaussianAdaptiveAttention(nn.Module):
    """`GaussianHeads` over the tokens, or over the channels, of a token mechanism's input.

    Args:
        dim: channels C.
        heads: chunks of the axis, contiguous ones.
        gaussians: K, Gaussians per head.
        over: "tokens", as in the authors' example, or "channels", where no token sees another.
        padding: value of entries that are padding; None = none are.
        eps: added to the variance.
        official: the authors' padding and division, see the module's text.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        gaussians: int = 5,
        over: Over = "tokens",
        padding: float | None = None,
        eps: float = 1e-8,
        official: bool = False,
    ):
        super().__init__()
        if over not in _AXES:
            raise bad("over", over, "'tokens' or 'channels'")
        self.dim, self.over = check_int(dim, "dim", 1), over
        self.gate = GaussianHeads(
            axis=_AXES[over], heads=heads, gaussians=gaussians, padding=padding, eps=eps, official=official
        )

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "GaussianAdaptiveAttention":
        """Return the published gate over tokens.

        Raises:
            ArgumentError: naming `causal`, or `grid` when it has fewer tokens than there are heads.
        """
        refuse_causal(causal, "mean and variance are over all tokens")
        check_heads(dim, heads)
        if grid.numel < heads:
            raise bad("grid", grid, f"{heads} tokens or more, one per head")
        return cls(dim=dim, heads=heads)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Weigh the tokens of `grid`, in row-major order.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim)
        return self.gate(x)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, over={self.over!r}"
