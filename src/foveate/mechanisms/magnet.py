"""Coordinate networks that draw kernels: a small network from positions to weights, evaluated on a grid."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize

from foveate.core.errors import bad

SHAPE, RATE = 6.0, 1.0  # of the gamma distribution of frequencies, as published


class Magnet(nn.Module):
    """Multiplicative sine network (MAGNet, arXiv 2110.08059), the "slow net" of arXiv 2401.17948.

        f_l(p) = sin(Linear_l(p)),    o = f_0;    o <- f_l * Linear(o) + b     for l = 1..layers
        kernel = Linear(o)                                                     (1, out, *sizes)

    p runs from -1 to 1 on every axis; b is one number per position, shared by the hidden channels.

    Args:
        sizes: of the kernel, one per axis, one or two.
        hidden: hidden channels.
        out: channels of the kernel.
        layers: multiplications.
        omega: scale of the frequencies at the start.

    Raises:
        ArgumentError: naming `sizes`, `hidden` or `layers`.
    """

    def __init__(self, *, sizes: tuple[int, ...], hidden: int, out: int, layers: int = 2, omega: float = 1.0):
        super().__init__()
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            raise bad("sizes", sizes, "one or two positive sizes")
        for name, value in (("hidden", hidden), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        self.sizes, self.hidden, self.omega = tuple(sizes), hidden, omega
        conv = nn.Conv1d if len(sizes) == 1 else nn.Conv2d
        self.filters = nn.ModuleList([conv(len(sizes), hidden, 1) for _ in range(layers + 1)])
        self.linears = nn.ModuleList([conv(hidden, hidden, 1) for _ in range(layers)])
        self.output_linear = conv(hidden, out, 1)
        self.bias = nn.Parameter(torch.zeros(1, 1, *sizes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw frequencies from a gamma distribution, lower in later layers; scale the kernel by its size."""
        with torch.no_grad():
            for layer, sine in enumerate(self.filters):
                assert isinstance(sine, nn.Conv1d | nn.Conv2d)
                gamma = torch.distributions.Gamma(SHAPE / (layer + 1), RATE).sample(sine.weight.shape)
                sine.weight *= 2 * math.pi * self.omega * gamma.to(sine.weight)
                zero_bias(sine)
            for linear in self.linears:
                assert isinstance(linear, nn.Conv1d | nn.Conv2d)
                nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
                zero_bias(linear, 1.0)
            nn.init.kaiming_uniform_(self.output_linear.weight, nonlinearity="linear")
            self.output_linear.weight *= math.prod(self.sizes) ** -0.5
            zero_bias(self.output_linear)

    def coords(self) -> Float[Tensor, "1 axes *sizes"]:
        """Return the positions p."""
        like = self.bias
        axes = [torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device) for size in self.sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)

    def forward(self) -> Float[Tensor, "1 out *sizes"]:
        """Draw the kernel."""
        coords = self.coords()
        o = self.filters[0](coords).sin()
        for i in range(len(self.linears)):
            o = self.multiply(coords, o, i)
        return self.output_linear(o)

    def multiply(self, coords: Tensor, o: Tensor, i: int) -> Tensor:
        """Apply multiplication `i`."""
        return self.filters[i + 1](coords).sin() * self.linears[i](o) + self.bias

    def extra_repr(self) -> str:
        """Show the options."""
        return f"sizes={self.sizes}, hidden={self.hidden}, layers={len(self.linears)}, omega={self.omega}"


class ContextMagnet(Magnet):
    """A square kernel that depends on content, too, through the mean of a context over the *batch*.

    The context x (B, C, Y, X) is pooled to the size of the kernel and averaged; it multiplies every layer after a
    renormalisation, |o| being the norm of each hidden channel:

        c = GELU(Linear(mean_b Linear(pool(x))));    o <- (alpha o + beta o / |o|) * Linear_l(c)

    Args:
        size: side of the kernel.
        context: channels of the context.
        hidden, out, layers, omega: as in `Magnet`.
        official: take `alpha o` out of the gradient, as the authors of arXiv 2401.17948 do.
    """

    def __init__(
        self,
        *,
        size: int,
        context: int,
        hidden: int,
        out: int,
        layers: int = 2,
        omega: float = 1.0,
        official: bool = False,
    ):
        super().__init__(sizes=(size, size), hidden=hidden, out=out, layers=layers, omega=omega)
        self.size, self.official = size, official
        self.reduce, self.fc = nn.Conv2d(context, hidden, 1), nn.Conv2d(hidden, hidden, 1)
        factors = [nn.Conv2d(hidden, hidden, 1) for _ in range(layers)]
        for factor in factors:
            nn.init.kaiming_uniform_(factor.weight, nonlinearity="linear")
            zero_bias(factor, 1.0)
        self.factors = nn.ModuleList(factors)
        self.alpha = nn.Parameter(torch.ones(layers, hidden))
        self.beta = nn.Parameter(torch.full((layers, hidden), 0.1))

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "1 out k k"]:
        """Draw the kernel that the batch `x`, of at least one sample, asks for."""
        pooled = self.reduce(adaptive_avg_pool2d(x, (self.size, self.size))).mean(0, keepdim=True)
        context = gelu(self.fc(pooled))
        coords = self.coords()
        o = self.filters[0](coords).sin()
        for i, factor in enumerate(self.factors):
            o = self.renormalised(self.multiply(coords, o, i), i) * factor(context)
        return self.output_linear(o)

    def renormalised(self, o: Float[Tensor, "1 h k k"], i: int) -> Float[Tensor, "1 h k k"]:
        """Return alpha o + beta o / |o|, with the constants of layer `i`."""
        alpha, beta = (part[i].reshape(1, -1, 1, 1) for part in (self.alpha, self.beta))
        unit = normalize(o.flatten(2), dim=2).view_as(o)
        return alpha * (o.detach() if self.official else o) + beta * unit


def zero_bias(conv: nn.Conv1d | nn.Conv2d, value: float = 0.0) -> None:
    """Set the bias of a convolution to `value`."""
    if conv.bias is not None:
        nn.init.constant_(conv.bias, value)
