"""RALA (arXiv 2411.07635): sizes of RAVLT, and what each of its parts does to the rank of linear attention."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.kernels.flops import attention_flops
from foveate.mechanisms.linear.rala import RALABlock, key_weights, rank_augmented
from foveate.scores.rotary import axial_angles

MODELS = {
    "RAVLT-T": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), "15M, 2.4G"),
    "RAVLT-S": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), "26M, 4.6G"),
    "RAVLT-B": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), "48M, 9.9G"),
    "RAVLT-L": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), "95M, 16.0G"),
}
RATIO, WIDE = 3.5, 1024


def figures() -> Iterator[Figure]:
    """Yield parameters and multiply-adds of the models, and effective ranks."""
    for name, (dims, depths, heads, printed) in MODELS.items():
        size, adds = ravlt(dims, depths, heads)
        yield Figure(
            claim=f"{name}: parameters, multiply-adds",
            paper=printed,
            ours=f"{size / 1e6:.1f}M, {adds / 1e9:.2f}G",
            how="our blocks; stem, merging and head counted layer by layer; one image of 224 x 224, 1000 classes",
        )
    how = (
        "exp of the entropy of singular values, mean of 8 heads; 196 random normal tokens, 32 channels a head, "
        "random projections; the paper shows trained layers"
    )
    maps, buffers, features = ranks()
    yield Figure(
        claim="effective rank of the KV buffer: plain, with weighted keys",
        paper="higher with weighted keys, full",
        ours=", ".join(f"{x:.1f}" for x in buffers) + " of 32",
        how=how,
    )
    yield Figure(
        claim="effective rank of the N x N map: plain, weighted keys, turned, both",
        paper="not given",
        ours=", ".join(f"{x:.1f}" for x in maps),
        how=how,
    )
    yield Figure(
        claim="effective rank of the features: plain, RALA before the gate, after the gate",
        paper="higher after the gate, full",
        ours=", ".join(f"{x:.1f}" for x in features) + " of 32",
        how=how,
    )


def ranks() -> tuple[list[float], list[float], list[float]]:
    """Return effective ranks of maps, KV buffers and features."""
    generator = torch.Generator().manual_seed(0)
    n, d, side = 196, 32, 14
    x = torch.randn(1, 8, n, d, generator=generator, dtype=torch.float64)
    q, k, v, o = (
        x @ torch.randn(1, 8, d, d, generator=generator, dtype=torch.float64) / d**0.5 for _ in range(4)
    )
    angles = axial_angles(Grid(side, side), d, inclusive=True, dtype=torch.float64)
    turns = (angles.cos(), angles.sin())
    unit = torch.eye(n, dtype=torch.float64).expand(1, 8, n, n)
    maps = [
        effective_rank(rank_augmented(q, k, unit, turns=turn, augment=augment))
        for turn, augment in ((None, False), (None, True), (turns, False), (turns, True))
    ]
    fq, fk = elu(q) + 1, elu(k) + 1
    buffers = [effective_rank(part.mT @ v) for part in (fk, fk * key_weights(fq, fk).unsqueeze(-1))]
    y = rank_augmented(q, k, v, turns=turns)
    features = [effective_rank(part) for part in (rank_augmented(q, k, v, augment=False), y, y * o)]
    return maps, buffers, features


def effective_rank(x: Tensor) -> float:
    """Return the mean over heads of exp(entropy of the normalised singular values)."""
    share = torch.linalg.svdvals(x)
    share = share / share.sum(-1, keepdim=True)
    return (-(share * share.clamp_min(1e-30).log()).sum(-1)).exp().mean().item()


def ravlt(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[int, int]:
    """Return (parameters, multiply-adds) of a RAVLT at 224 x 224 with 1000 classes."""
    size, adds = 0, 0

    def add(positions: int, layer: nn.Module) -> None:
        nonlocal size, adds
        size += sum(p.numel() for p in layer.parameters())
        adds += positions * sum(p.numel() for name, p in layer.named_parameters() if p.shape[1:].numel() > 1)

    with torch.device("meta"):
        half = dims[0] // 2
        for positions, inner, outer in (
            (112**2, 3, half),
            (112**2, half, half),
            (112**2, half, half),
            (56**2, half, dims[0]),
        ):
            add(positions, nn.Conv2d(inner, outer, 3))
            add(0, nn.BatchNorm2d(outer))
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            n, form = (56 >> stage) ** 2, "linear" if stage < 2 else "softmax"
            for _ in range(depth):
                block = RALABlock(
                    dim=dim, heads=heads[stage], hidden=int(RATIO * dim), form=form, layer_scale=1.0
                )
                add(n, block)
                if form == "linear":  # mean query, weights, sums and reading
                    adds += 2 * n * dim + 2 * n * dim * dim // heads[stage]
                else:
                    adds += (
                        attention_flops(n * n * heads[stage], dim // heads[stage], dim // heads[stage]) // 2
                    )
            if stage < 3:
                add(n // 4, nn.Conv2d(dim, dims[stage + 1], 3))
                add(0, nn.BatchNorm2d(dims[stage + 1]))
        add(49, nn.Conv2d(dims[-1], WIDE, 1))
        add(0, nn.BatchNorm2d(WIDE))
        add(1, nn.Conv2d(WIDE, 1000, 1))
    return size, adds
