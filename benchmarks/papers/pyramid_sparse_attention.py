"""PSA: how much is left to compute, and how exact pooling is."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.banks import join_banks
from foveate.mechanisms.routed.pyramid_sparse_attention import (
    PyramidSparseAttention,
    pyramid_attention,
    pyramid_banks,
)

N, BLOCK = 5120, (128, 128)


def figures() -> Iterator[Figure]:
    """Density of the default levels, and the error of replacing blocks by pooled ones or by nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, N, 64) for _ in range(3))
    module = PyramidSparseAttention(dim=128, heads=2, block=BLOCK, tile=32)
    levels = module.route(q, k)
    joined = join_banks(pyramid_banks(k, v, levels, n_q=N, blocks=BLOCK), N)
    found = explain(q, **joined._asdict())
    seen = float((levels > 0).float().mean())
    yield Figure(
        claim="pairs computed at the default levels, of dense attention",
        paper="15.6% (shares 5%, 10%, 10%, 25% at levels 1, 2, 4, 8: sum of share / level)",
        ours=f"{found.pairs_needed / (2 * N * N):.1%}, while {seen:.0%} of the blocks are seen",
        how=f"N = {N}, blocks of 128, tiles of 32, random q and k; pairs counted from the cells",
    )
    smooth = torch.randn(1, 2, N // 128, 64).double().repeat_interleave(128, 2)
    some = q[:, :, :256].double()
    out = pyramid_attention(some, smooth, smooth, torch.full_like(levels[:, :, :2], 8), blocks=BLOCK)
    error = float((out - attend(some, smooth, smooth)).abs().max())
    yield Figure(
        claim="error of level 8 where a block is constant (the ln p bias is exact)",
        paper="0",
        ours=f"{error:.0e}",
        how="fp64, largest absolute difference from dense attention",
    )
    rough = torch.randn(1, 2, N // 8, 64).repeat_interleave(8, 2)
    keys = rough + 0.3 * torch.randn(1, 2, N, 64)
    dense = attend(q, keys, keys)
    levels = module.route(q, keys)
    errors = []
    for kept in (levels, torch.where(levels == 1, 1, 0)):
        out = pyramid_attention(q, keys, keys, kept, blocks=BLOCK)
        errors.append(float((out - dense).norm() / dense.norm()))
    yield Figure(
        claim="relative error, pyramid against its level-1 blocks alone",
        paper="pooled blocks preserve more than dropped ones (no number comparable)",
        ours=f"{errors[0]:.2f} against {errors[1]:.2f}",
        how="keys and values that vary by 0.3 around the mean of every 8",
    )
