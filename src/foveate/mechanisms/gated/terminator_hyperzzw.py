"""HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction. arXiv 2401.17948, 2024.

No attention, no residuals. "Slow" networks turn coordinates into kernels W as large as the map; multiplying one with
the map Z, pixel by pixel, makes it depend on the context, and the product meets Z once more: globally as a product
of *matrices*, channel by channel over rows and columns, locally as a depthwise convolution with a small kernel that
the slow network draws from coordinates and content. One layer runs ten such branches side by side.

    Z = x (B, C, N, N), square;  W = slow(coordinates) (1, C, N, N);  S = Z * W;  IN: InstanceNorm without parameters
    fast = IN(rgu(x) + rgu'(S));  mixed = IN(Linear x);  picked = IN(x) * sigmoid(m w m)
    rgu(x) = Linear(GELU(IN(Linear x * Linear Linear x)) + b)                b: one number per pixel
    m = means of x over pixels (B, C), w = slow(channel index) (C,)
    global: o = S fast,  S mixed,  S picked, matrix products per channel;  o * sigmoid(o)
    gated: x * sigmoid((m w m)(s w' s)),  m, s = means of o over pixels and over channels
    local: GELU(BN(Linear(dwconv(z, slow(coordinates, z'))))) + b  for (z', z) = (x, picked), (picked, x),
           (mixed, x), (x, mixed) and kernels 3, 9, 5, 7;  BN: batch statistics, always, without parameters
    out = Linear [o, local2, fast, S mixed, local1, o sigmoid(o), local3, S picked, local4, gated]   (B, C', N, N)

The local kernels and BN look at the whole batch, in evaluation too: outputs depend on batch mates. `official=True`
follows the authors' code in two points: it scales channels before the norm, which takes the scale away again up to
its epsilon, so that this slow network cannot learn; and it keeps part of the local kernels' gradient back (see
`ContextMagnet`). Equal on vectors to a transcription of the authors' historical modules, as their repository no
longer holds them. Not part of this: the blocks with their group norm, the network, its loss between slow kernels.
Linear layers right before a norm have no bias here, as the norm would take it away. How fast coordinates oscillate at
the start (`omega`) is our choice.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, gelu, instance_norm

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.mechanisms.inputs import check_spatial, refuse_causal
from foveate.mechanisms.magnet import ContextMagnet, Magnet, zero_bias

Map = Float[Tensor, "b c n n"]


def hyper_global(x: Map, kernel: Float[Tensor, "1 c n n"], fast: Map) -> Map:
    """Return (x * kernel) fast: a product of matrices per channel, rows of x against columns of `fast`."""
    return (x * kernel) @ fast


def standard(x: Map) -> Map:
    """Return every channel of every sample with mean 0 and variance 1."""
    return instance_norm(x)


class RecursiveGate(nn.Module):
    """Two linear maps multiply each other, one of them through a third: Linear(GELU(IN(k * Linear v)) + b).

    Args:
        dim: channels C.
        size: side N of the map, which the bias belongs to.
    """

    def __init__(self, *, dim: int, size: int):
        super().__init__()
        self.k, self.v = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.q, self.y = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1, 1, size, size))
        for conv in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
            zero_bias(conv)

    def forward(self, x: Map) -> Map:
        """Apply the unit."""
        return self.y(gelu(standard(self.k(x) * self.q(self.v(x)))) + self.bias)


class ChannelInteract(nn.Module):
    """Scale channels by their means, seen through a kernel over the channel index.

    Args:
        dim: channels C.
        hidden, layers, omega: of the slow network.
    """

    def __init__(self, *, dim: int, hidden: int, layers: int = 2, omega: float = 1.0):
        super().__init__()
        self.channels = Magnet(sizes=(dim,), hidden=hidden, out=1, layers=layers, omega=omega)

    def score(self, y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """Return m w m per channel."""
        mean = y.mean((2, 3))
        return (mean * self.channels()[:, 0] * mean)[..., None, None]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scale the channels of `x`."""
        return x * self.score(x).sigmoid()


class Interact(ChannelInteract):
    """Scale every entry of `x` by means of `y` over channels times means over pixels, each seen through a kernel.

    Args:
        dim: channels C.
        size: side N of the map.
        hidden, layers: of the slow network over channels, and with `space_` of the one over pixels.
        omega: of both.
    """

    def __init__(
        self,
        *,
        dim: int,
        size: int,
        hidden: int,
        layers: int = 2,
        space_hidden: int,
        space_layers: int = 2,
        omega: float = 1.0,
    ):
        super().__init__(dim=dim, hidden=hidden, layers=layers, omega=omega)
        self.space = Magnet(sizes=(size, size), hidden=space_hidden, out=1, layers=space_layers, omega=omega)

    def forward(self, y: Map, x: Map | None = None) -> Map:
        """Scale `x`, or `y` itself."""
        mean = y.mean(1, keepdim=True)
        score = (mean * self.space() * mean) * self.score(y)
        return (y if x is None else x) * score.sigmoid()


class LocalBranch(nn.Module):
    """A depthwise convolution whose kernel is drawn from coordinates and the batch mean of a context.

    Args:
        dim: channels C.
        kernel: side of the kernel; odd.
        hidden, layers, omega, official: of the slow network.
    """

    def __init__(
        self,
        *,
        dim: int,
        kernel: int,
        hidden: int,
        layers: int = 2,
        omega: float = 1.0,
        official: bool = False,
    ):
        super().__init__()
        if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise bad("kernels", kernel, "positive odd numbers", "The convolution keeps the size of the map.")
        self.kernel = ContextMagnet(
            size=kernel, context=dim, hidden=hidden, out=dim, layers=layers, omega=omega, official=official
        )
        self.mix = nn.Conv2d(dim, dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.kaiming_normal_(self.mix.weight)

    def forward(self, context: Map, x: Map) -> Map:
        """Convolve `x` with the kernel that `context` asks for."""
        kernel = self.kernel(context).transpose(0, 1)
        y = self.mix(conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1]))
        return gelu(batch_norm(y, None, None, training=True)) + self.bias


@system(
    key="terminator_hyperzzw",
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    arxiv="2401.17948",
    year=2024,
    family="gated",
    role="module",
    cost="O(N^1.5 C + N C^2)",
    layout="spatial",
    fidelity="vectors",
    primitive="own (kernels drawn by coordinate networks; products of maps, no logits)",
    sizes="the square map it was made for",
    dims=(2,),
    batch_coupled=True,
    limits="Square images of one size; a sample's output depends on its batch, in evaluation too.",
)
class TerminatorLayer(nn.Module):
    """The fast multi-branch layer: global, local and gated branches over one map, joined by a linear map.

    Args:
        dim: channels C.
        size: side of the square map, at least 2.
        out: channels C' that come out; C when None.
        hidden: hidden channels of the slow networks: global, local, channels, and the gate's channels and pixels.
        layers: their multiplications, one number or five.
        kernels: sides of the four local kernels; odd.
        omega: their frequencies at the start.
        previous: how many earlier maps, up to 2, the layer also joins (dense connections between blocks).
        official: scale channels before their norm, and learn local kernels, as the authors' code does.

    Raises:
        ArgumentError: naming the option that does not fit.
    """

    def __init__(
        self,
        *,
        dim: int,
        size: int,
        out: int | None = None,
        hidden: Sequence[int] = (64, 32, 32, 16, 64),
        layers: int | Sequence[int] = 2,
        kernels: Sequence[int] = (3, 9, 5, 7),
        omega: float = 1.0,
        previous: int = 0,
        official: bool = False,
    ):
        super().__init__()
        depths = (layers,) * 5 if isinstance(layers, int) else tuple(layers)
        out = dim if out is None else out
        for name, value, least in (("dim", dim, 1), ("size", size, 2), ("out", out, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise bad(name, value, f"an integer of at least {least}")
        for name, values, count in (("hidden", hidden, 5), ("layers", depths, 5), ("kernels", kernels, 4)):
            if len(values) != count:
                raise bad(name, tuple(values), f"{count} numbers")
        if previous not in (0, 1, 2):
            raise bad("previous", previous, "0, 1 or 2")
        self.dim, self.size, self.out, self.previous, self.official = dim, size, out, previous, official
        wide, near, channels, gate, space = zip(hidden, depths, strict=True)
        self.kernel = Magnet(sizes=(size, size), hidden=wide[0], out=dim, layers=wide[1], omega=omega)
        self.local = nn.ModuleList(
            LocalBranch(dim=dim, kernel=k, hidden=near[0], layers=near[1], omega=omega, official=official)
            for k in kernels
        )
        self.rgu, self.rgu_slow = RecursiveGate(dim=dim, size=size), RecursiveGate(dim=dim, size=size)
        self.mixer = nn.Conv2d(dim, dim, 1, bias=False)
        self.picker = ChannelInteract(dim=dim, hidden=channels[0], layers=channels[1], omega=omega)
        self.gate = Interact(
            dim=dim, size=size, hidden=gate[0], layers=gate[1], space_hidden=space[0], space_layers=space[1],
            omega=omega,
        )  # fmt: skip
        self.join = nn.Conv2d((10 + previous) * dim, out, 1)
        for conv in (self.mixer, self.join):
            nn.init.kaiming_normal_(conv.weight)
            zero_bias(conv)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "TerminatorLayer":
        """Return a layer with slow networks of 16 hidden channels and kernels no larger than the map.

        Raises:
            ArgumentError: naming `grid`, unless it is a square map of at least 2 x 2, or `causal`.
        """
        refuse_causal(causal, "kernels cover the whole map")
        if grid.ndim != 2 or grid[0] != grid[1] or grid[0] < 2:
            raise bad("grid", grid, "a square grid with 2 axes", "It multiplies rows with columns.")
        largest = (grid[0] - 1) // 2 * 2 + 1
        return cls(dim=dim, size=grid[0], hidden=(16,) * 5, kernels=[min(k, largest) for k in (3, 9, 5, 7)])

    def forward(self, x: Map, *previous: Map) -> Float[Tensor, "b out n n"]:
        """Run all branches over `x`, of the size the layer was made for, at least one sample.

        Args:
            x: the map.
            previous: maps of the blocks before, as many as `previous`, whose channels divide C.

        Raises:
            ArgumentError: naming `x` or `previous`.
        """
        check_spatial(x, self.dim)
        if x.shape[2:] != (self.size, self.size) or x.shape[0] == 0:
            expected = f"(batch >= 1, {self.dim}, {self.size}, {self.size}), the map it was made for"
            raise bad("x", tuple(x.shape), expected)
        if len(previous) != self.previous or any(self.dim % p.shape[1] for p in previous):
            raise bad(
                "previous",
                [tuple(p.shape) for p in previous],
                f"{self.previous} maps, channels dividing {self.dim}",
            )
        earlier = [p.repeat(1, self.dim // p.shape[1], 1, 1) for p in previous]
        kernel = self.kernel()
        fast = standard(self.rgu_slow(x * kernel) + self.rgu(x))
        mixed = standard(self.mixer(x))
        picked = standard(self.picker(x)) if self.official else standard(x) * self.picker.score(x).sigmoid()
        full, of_mixed, of_picked = (hyper_global(x, kernel, z) for z in (fast, mixed, picked))
        pairs = ((x, picked), (picked, x), (mixed, x), (x, mixed))
        near = [branch(*pair) for branch, pair in zip(self.local, pairs, strict=True)]
        parts = [
            full,
            near[1],
            *earlier[:1],
            fast,
            of_mixed,
            near[0],
            full.sigmoid() * full,
            near[2],
            of_picked,
        ]
        return self.join(torch.cat([*parts, near[3], *earlier[1:], self.gate(full, x)], dim=1))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, size={self.size}, out={self.out}, previous={self.previous}"
