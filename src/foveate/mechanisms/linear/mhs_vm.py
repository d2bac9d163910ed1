"""MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba. arXiv 2406.05992, 2024.

A selective state space reads a map as a sequence, and no single order of the pixels is right. Here the channels are
projected into subspaces, one per head, and every head reads the map along its own family of routes: rows and
columns as a snake, diagonals, spirals, or plain rasters; two routes each, from both ends. The four readings of a
head are added and weighed by their coefficient of variation: where all directions say the same, nothing passes.

    X = x W_ss, cut into heads X_h                                           (B, N, s), s = C // heads
    y_h,k = S6_h,k(X_h along route k), put back, k = 1..4                    (B, N, s) each
    cv_h  = std_k(y_h,k) / (mean_k(y_h,k - min_k y_h,k) + 1e-5)              std with 4 - 1 in the divisor
    f_h   = (sum_k y_h,k) ReLU(cv_h - t)                                     (B, N, s)
    y     = LayerNorm([f_1 | ... | f_heads]) W_y                             (B, N, C)

The layer around it, as in VMamba: [x, z] = x W_in, y from SiLU(dwconv3x3(x)), out = LayerNorm(y) SiLU(z); the
ungated form has neither W_in nor z. S6 is `SelectiveSSM`. Routes are computed for every map size, 1 x 1 included.
"""

from collections.abc import Sequence
from functools import lru_cache

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.core.tracing import run_eagerly
from foveate.kernels.scan.selective import Backend
from foveate.kernels.scan.walk import along, put_back
from foveate.mechanisms.inputs import check_heads, check_tokens, refuse_causal
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.mechanisms.state_space import SelectiveSSM
from foveate.patterns.paths import Path, columns, diagonal, raster, snake, spiral

FAMILIES = ("snake", "diagonal", "spiral", "raster")  # the authors' C, X, S, Z, in the order of their heads


@lru_cache(maxsize=128)
def family(name: str, grid: Grid) -> tuple[Path, ...]:
    """Return the four routes of a family: the first, the first reversed, the second, the second reversed.

    Raises:
        ArgumentError: naming `routes`, when there is no such family.
    """
    if name == "snake":
        pair = snake(grid), snake(grid, 0)
    elif name == "diagonal":
        pair = diagonal(grid), diagonal(grid).mirrored(1)
    elif name == "spiral":
        pair = spiral(grid), spiral(grid).mirrored(0)
    elif name == "raster":
        pair = raster(grid), columns(grid)
    else:
        raise bad("routes", name, f"a family out of {FAMILIES}")
    return tuple(path for route in pair for path in (route, route.reversed()))


def fuse(y: Float[Tensor, "b h k n s"], threshold: float = 0.0) -> Float[Tensor, "b h n s"]:
    """Add the readings k, weighed by ReLU(coefficient of variation - threshold); two readings at least."""
    spread = y.std(dim=2)
    height = (y - y.amin(dim=2, keepdim=True)).mean(dim=2)
    return y.sum(dim=2) * (spread / (height + 1e-5) - threshold).relu()


class MultiHeadScan(nn.Module):
    """The multi-head scan module: every head scans its subspace along its own family of routes.

    Args:
        dim: channels C.
        routes: one family per head: "snake", "diagonal", "spiral" or "raster".
        states: states per channel of each scan.
        threshold: t, what of the coefficient of variation does not count.
        project: whether LayerNorm and W_y follow; without them `dim` must be a multiple of the heads.
        backend: of `selective_scan`.

    Raises:
        ArgumentError: naming `routes` or `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        routes: Sequence[str] = ("snake", "diagonal", "spiral"),
        states: int = 16,
        threshold: float = 0.0,
        project: bool = True,
        backend: Backend = "auto",
    ):
        super().__init__()
        routes = tuple(routes)
        for name in routes:
            family(name, Grid(1, 1))
        heads = len(routes)
        if not heads:
            raise bad("routes", routes, f"at least one family out of {FAMILIES}")
        if dim < heads or (not project and dim % heads):
            raise bad("dim", dim, f"a multiple of the {heads} routes {routes}")
        self.dim, self.routes, self.heads, self.threshold = dim, routes, heads, threshold
        width = dim // heads
        self.subspaces = nn.Linear(dim, heads * width, bias=False)
        self.ssm = SelectiveSSM(groups=4 * heads, channels=width, states=states, backend=backend)
        self.norm = nn.LayerNorm(heads * width) if project else None
        self.proj = nn.Linear(heads * width, dim, bias=False) if project else None

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        readings = self.read(split_heads(self.subspaces(x), self.heads), grid)
        y = merge_heads(fuse(readings, self.threshold)).to(x.dtype)
        return y if self.norm is None or self.proj is None else self.proj(self.norm(y))

    @run_eagerly  # traced, the making of the routes would be part of every graph
    def read(self, heads: Float[Tensor, "b h n s"], grid: Grid) -> Float[Tensor, "b h 4 n s"]:
        """Scan every head along its four routes; the readings lie in the order of the map again."""
        paths = [path for name in self.routes for path in family(name, grid)]
        readings = self.ssm(along(heads.repeat_interleave(4, dim=1), paths))
        return put_back(readings, paths).unflatten(1, (self.heads, 4))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, routes={self.routes}, threshold={self.threshold}"


@system(
    key="mhs_vm",
    title="MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba",
    arxiv="2406.05992",
    year=2024,
    family="linear",
    role="pattern + linear-kernel + gate",
    cost="O(N C S), S states per channel",
    fidelity="vectors",
    primitive="scan",
    dims=(2,),
)
class MHSVM(nn.Module):
    """The visual state space layer around the multi-head scan.

    Args:
        dim: channels C.
        routes: one family per head: "snake", "diagonal", "spiral" or "raster".
        states: states per channel of each scan.
        threshold: t, what of the coefficient of variation does not count.
        project: whether the heads are normed and projected after they are joined.
        gated: whether a projection of the input gates the output; there is no input projection otherwise.
        conv: side of the depthwise convolution, odd.
        backend: of `selective_scan`.

    Raises:
        ArgumentError: naming `routes`, `dim` or `conv`.
    """

    def __init__(
        self,
        *,
        dim: int,
        routes: Sequence[str] = ("snake", "diagonal", "spiral"),
        states: int = 16,
        threshold: float = 0.0,
        project: bool = True,
        gated: bool = True,
        conv: int = 3,
        backend: Backend = "auto",
    ):
        super().__init__()
        if not isinstance(conv, int) or conv < 1 or conv % 2 == 0:
            raise bad("conv", conv, "an odd side of the convolution")
        self.dim, self.gated = dim, gated
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False) if gated else None
        self.conv = nn.Conv2d(dim, dim, conv, padding=conv // 2, groups=dim)
        self.scan = MultiHeadScan(
            dim=dim, routes=routes, states=states, threshold=threshold, project=project, backend=backend
        )
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "MHSVM":
        """Return the gated layer with four families of routes, or three where the channels divide by three only."""
        refuse_causal(causal, "routes run through the map from both ends")
        if grid.ndim != 2:
            raise bad("grid", grid, "a grid with 2 axes", "Its routes are walks over a map.")
        check_heads(dim, heads)
        count = next(n for n in (4, 3, 2, 1) if dim % n == 0)
        return cls(dim=dim, routes=FAMILIES[:count])

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2,))
        gate = None
        if self.in_proj is not None:
            x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = silu(self.conv(x.transpose(1, 2).unflatten(2, grid.sizes))).flatten(2).transpose(1, 2)
        y = self.norm(self.scan(x, grid))
        return y if gate is None else y * silu(gate)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, gated={self.gated}"
