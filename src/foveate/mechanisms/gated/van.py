"""Visual Attention Network. arXiv 2202.09741, 2022.

A large K x K convolution is cheap when taken apart: a depthwise convolution joins neighbours, a dilated
depthwise one carries them far, a 1 x 1 convolution mixes channels. What comes out is multiplied with the
input, channel by channel and pixel by pixel; it passes through no softmax or sigmoid, so it may amplify or
change sign. With x (B, C, H, W) and dilation d:

    map(x) = W_mix * (W_dilated * (W_local * x))                            (B, C, H, W)
    gate(x) = x . map(x)                                                    (B, C, H, W)
    y = x + W_out gate(gelu(W_in x))                                        (B, C, H, W)

W_local has 2d - 1 taps per axis, W_dilated ceil(K / d) taps that are d apart, the others are 1 x 1. Every
convolution has a bias and is padded with zeros to keep the size. As published, K = 21 and d = 3, so 5 x 5 and
7 x 7 taps, and the field is 5 + 3 (7 - 1) = 23 wide, not 21. The residual is inside the module: the block
around it normalises first, so what is added here is the normalised input.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.mechanisms.inputs import check_spatial, refuse_causal


class LargeKernelAttention(nn.Module):
    """Multiply a map with what a decomposed K x K convolution makes of it.

    Args:
        dim: channels C.
        kernel: K, the side of the convolution that is taken apart.
        dilation: d, the distance of the taps of the dilated part.

    Raises:
        ArgumentError: naming `dim`, `dilation` or `kernel`.
    """

    def __init__(self, *, dim: int, kernel: int = 21, dilation: int = 3):
        super().__init__()
        for name, value in (("dim", dim), ("dilation", dilation), ("kernel", kernel)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        local, taps = 2 * dilation - 1, math.ceil(kernel / dilation)
        span = dilation * (taps - 1)
        if span % 2:
            # An odd span has no middle: the map would come out one pixel short or off centre.
            hint = f"With dilation={dilation}, kernel={(taps + 1) * dilation} is one that fits."
            raise bad("kernel", kernel, f"dilation * (ceil(kernel / dilation) - 1) even, not {span}", hint)
        self.dim, self.kernel, self.dilation = dim, kernel, dilation
        self.local = nn.Conv2d(dim, dim, local, padding=dilation - 1, groups=dim)
        self.dilated = nn.Conv2d(dim, dim, taps, padding=span // 2, dilation=dilation, groups=dim)
        self.mix = nn.Conv2d(dim, dim, 1)
        for conv in (self.local, self.dilated, self.mix):
            init_conv(conv)

    @property
    def reach(self) -> int:
        """How many pixels away, per axis and direction, an input still changes an output."""
        return self.dilation - 1 + self.dilation * (self.dilated.kernel_size[0] - 1) // 2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Gate `x` by its own neighbourhood.

        Raises:
            ArgumentError: naming `x`.
        """
        check_spatial(x, self.dim)
        return x * self.mix(self.dilated(self.local(x)))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, kernel={self.kernel}, dilation={self.dilation}"


@system(
    key="van",
    title="Visual Attention Network",
    arxiv="2202.09741",
    year=2022,
    family="gated",
    role="gate",
    cost="O(N C (C + (2d - 1)^2 + (K/d)^2)), K = 21, d = 3",
    layout="spatial",
    fidelity="vectors",
    primitive="own (depthwise convolutions, no attention logits)",
    limits="Images only; one layer sees 11 pixels each way, with weights that do not depend on content.",
    dims=(2,),
)
class VANAttention(nn.Module):
    """Large kernel attention between two 1 x 1 convolutions, with the residual inside.

    Args:
        dim: channels C.
        kernel: K, as in `LargeKernelAttention`.
        dilation: d, as in `LargeKernelAttention`.

    Raises:
        ArgumentError: naming `dim`, `dilation` or `kernel`.
    """

    def __init__(self, *, dim: int, kernel: int = 21, dilation: int = 3):
        super().__init__()
        self.gate = LargeKernelAttention(dim=dim, kernel=kernel, dilation=dilation)
        self.dim = dim
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.proj_out = nn.Conv2d(dim, dim, 1)
        for conv in (self.proj_in, self.proj_out):
            init_conv(conv)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "VANAttention":
        """Return the published kernel, 21 with dilation 3; there are no heads, so `heads` changes nothing.

        Raises:
            ArgumentError: naming `grid` or `causal`.
        """
        refuse_causal(causal, "the convolutions look both ways")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "The convolutions are published for images.")
        return cls(dim=dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Mix the pixels of `x`, any height and width.

        Raises:
            ArgumentError: naming `x`.
        """
        check_spatial(x, self.dim)
        return x + self.proj_out(self.gate(self.act(self.proj_in(x))))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}"


def init_conv(conv: nn.Conv2d) -> None:
    """Draw weights as the authors do: normal, variance 2 / (taps x outputs per group); biases are zero."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
