"""MHS-VM: what splitting the scan over subspaces saves, and how much of the map a route keeps together."""

from collections.abc import Iterator

from torch import nn

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.linear.mhs_vm import FAMILIES, MHSVM, family
from foveate.mechanisms.state_space import SelectiveSSM

DIMS, DEPTHS = (96, 192, 384, 768), {"encoder": (2, 2, 9, 2), "decoder": (2, 9, 2, 2)}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def vmamba_layer(dim: int, states: int = 16) -> int:
    """Parameters of the layer that VM-UNet has in its place: 2 C inner channels, 4 directions, projections."""
    inner = 2 * dim
    ssm = count(SelectiveSSM(groups=4, channels=inner, states=states, rank=-(-dim // 16)))
    return ssm + 2 * inner * dim + 9 * inner + inner + 2 * inner + inner * dim


def layers(of) -> int:
    """Parameters of all layers of an encoder and a decoder."""
    encoder = sum(depth * of(dim) for dim, depth in zip(DIMS, DEPTHS["encoder"], strict=True))
    decoder = sum(depth * of(dim) for dim, depth in zip(DIMS[::-1], DEPTHS["decoder"], strict=True))
    return encoder + decoder


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    theirs = layers(vmamba_layer)
    for heads in (3, 4):
        ours = layers(lambda dim, heads=heads: count(MHSVM(dim=dim, routes=FAMILIES[:heads])))
        yield Figure(
            claim=f"parameters of the layers of a U-Net with {heads} heads over those of VM-UNet",
            paper="fewer parameters than VM-UNet",
            ours=f"{ours / theirs:.2f} ({ours / 1e6:.1f}M against {theirs / 1e6:.1f}M)",
            how="2, 2, 9, 2 layers down and 2, 9, 2, 2 up, 96 to 768 channels; merging, expanding and head left out",
        )
    entries = [4 * 2 * 96 * 16, 4 * 96 * 16]
    yield Figure(
        claim="states carried per token, of VM-UNet's first layer over this one",
        paper="not given",
        ours=f"{entries[0] / entries[1]:.0f}x",
        how="4 directions, 16 states; 2 C inner channels there, C channels shared by the heads here",
    )
    grid = Grid(16, 16)
    for name in FAMILIES:
        steps = [grid.coords()[path.order].diff(dim=0).abs().amax(1) for path in family(name, grid)]
        kept = sum(float((step <= 1).float().mean()) for step in steps) / len(steps)
        yield Figure(
            claim=f"steps of the {name} routes that lead to a neighbouring pixel",
            paper="not given",
            ours=f"{kept:.0%}",
            how="all four routes on a 16 x 16 map",
        )
