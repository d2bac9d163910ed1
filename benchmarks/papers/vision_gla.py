"""ViG: parameters of the plain models, and how the cost of a model grows with the image beside DeiT's."""

from collections.abc import Iterator

from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.scan import scan_cost
from foveate.mechanisms.linear.vision_gla import VisionGLA, VisionGLABlock

DEPTH, PATCH, CLASSES = 12, 16, 1000
MODELS = {"T": (192, 3, "6M"), "S": (384, 6, "23M"), "B": (768, 12, "89M")}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def parameters(dim: int, heads: int) -> int:
    """A plain model: one patch embedding, positions of a 14 x 14 map, 12 blocks, a norm and a head."""
    block = count(VisionGLABlock(mixer=VisionGLA(dim=dim, heads=heads)))
    ends = count(nn.Conv2d(3, dim, PATCH, PATCH), nn.RMSNorm(dim), nn.Linear(dim, CLASSES))
    return DEPTH * block + ends + 14 * 14 * dim


def projections(*modules: nn.Module) -> int:
    """Multiply-adds per token of every linear map and convolution, counted twice."""
    return 2 * sum(p.numel() for m in modules for p in m.parameters() if p.ndim > 1)


def vig_flops(dim: int, heads: int, side: int) -> int:
    """FLOPs of the blocks of ViG on a map of side x side tokens."""
    n = side * side
    block = VisionGLABlock(mixer=VisionGLA(dim=dim, heads=heads))
    keys, values = dim // 2 // heads, dim // heads
    # What the recurrence needs: a pair into the state and a query on it, in both directions.
    scan = 2 * 4 * n * heads * keys * values
    return DEPTH * (n * projections(block) + scan)


def deit_flops(dim: int, heads: int, side: int) -> int:
    """FLOPs of the blocks of DeiT on the same map: 12 C^2 weights per block, and full attention."""
    n = side * side
    attention = explain(*[(1, heads, n, dim // heads)] * 3).flops
    return DEPTH * (2 * n * 12 * dim * dim + attention)


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    for name, (dim, heads, paper) in MODELS.items():
        yield Figure(
            claim=f"parameters of ViG-{name}",
            paper=paper,
            ours=f"{parameters(dim, heads) / 1e6:.1f}M",
            how=f"12 blocks of {dim} channels, patches of 16, a head of 1000 classes; widths and depth from the "
            "authors' code and its defaults",
        )
    for size in (224, 512, 1024):
        side = size // PATCH
        ours = [
            deit_flops(dim, heads, side) / vig_flops(dim, heads, side) for dim, heads, _ in MODELS.values()
        ]
        yield Figure(
            claim=f"FLOPs of DeiT-T over ViG-T on images of {size} x {size}",
            paper="5.2x" if size == 1024 else "not given",
            ours=f"{ours[0]:.1f}x (S {ours[1]:.1f}x, B {ours[2]:.1f}x)",
            how="12 blocks, patches of 16, every multiply-add of projections and attention counted as 2; the scan "
            "as its recurrence",
        )
    long = 64 * 64
    chunked = scan_cost(batch=1, heads=2 * 3, n=long, dk=32, dv=64, decay="channel").flops
    yield Figure(
        claim="operations of the scan in chunks over those of its recurrence, 1024 x 1024",
        paper="not given",
        ours=f"{chunked / (2 * 4 * long * 3 * 32 * 64):.1f}x",
        how=f"ViG-T on {Grid(64, 64)}, both directions, chunks of 64 tokens",
    )
