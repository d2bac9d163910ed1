"""Sparsifiner: FLOPs of attention and predictor over dense attention, and a predictor that learns."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.mechanisms.routed.sparsifiner import SparsifinerAttention
from foveate.routing.lowrank import Sparsity

DIM, HEADS, SIDE = 384, 6, 14  # DeiT-S


def reduction(keep: float) -> float:
    """Return the part of the FLOPs that a layer of DeiT-S saves, without the projections around attention."""
    torch.manual_seed(0)
    module = SparsifinerAttention(
        dim=DIM, heads=HEADS, grid=Grid(SIDE, SIDE), class_token=True, sparsity=Sparsity(keep=keep)
    )
    n, d = module.tokens, DIM // HEADS
    (reduced, _), rank = module.predictor.proj_c_q.weight.shape, module.predictor.proj_n.shape[1]
    where = module.predict(torch.randn(1, n, DIM), Grid(SIDE, SIDE)).where
    attention = 4 * d * where.schedule.pairs_needed / HEADS
    filled = (module.sparsity.thin_basis(module.predictor.basis) > 0).float().mean().item()
    coefficients = module.sparsity.coefficients or rank
    predictor = 2 * (2 * n * d * reduced + 2 * n * reduced * rank + n * coefficients * filled * n)
    return 1 - (attention + predictor) / (4 * d * n * n)


def recall(steps: int) -> float:
    """Return how many of a teacher's best keys are chosen, after `steps` steps of reconstruction."""
    torch.manual_seed(0)
    grid = Grid(8, 8)
    module = SparsifinerAttention(
        dim=16, heads=2, grid=grid, reduce_n=2, sparsity=Sparsity(coefficients=None)
    )
    at = grid.coords().float() / 2
    code = torch.cat([at.sin(), at.cos(), (2 * at).sin(), (2 * at).cos()] * 2, dim=1)
    with torch.no_grad():
        module.qkv.weight.zero_()
        for part in (0, 1):
            module.qkv.weight[16 * part : 16 * part + 16] = 2 * torch.eye(16)
    step = torch.optim.Adam(module.predictor.parameters(), 0.03)
    for _ in range(steps):
        loss = module.forward_reconstruct(code + 0.3 * torch.randn(8, 64, 16), grid)[1]
        step.zero_grad()
        loss.backward()
        step.step()
    x = code + 0.3 * torch.randn(8, 64, 16)
    q, k, _ = module.qkv(x)
    best = (q @ k.mT).topk(16, dim=-1).indices
    return module.predict(x, grid).where.dense().gather(-1, best).double().mean().item()


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    yield Figure(
        claim="FLOPs of attention saved, its predictor counted",
        paper="48 % to 69 %",
        ours=" / ".join(f"{reduction(keep):.0%}" for keep in (0.4, 0.25, 0.1)),
        how="DeiT-S, 197 tokens, keep rates 0.4 / 0.25 / 0.1, 8 coefficients; initial basis; no projections",
    )
    yield Figure(
        claim="best keys of the teacher that a trained predictor finds, over an untrained one",
        paper="not given",
        ours=f"{recall(300):.0%} over {recall(0):.0%}",
        how="64 tokens that attend to their neighbourhood and to noise, a fourth of the keys kept, 300 steps",
    )
