"""Combiner: every position is reached, at sub-quadratic cost."""

from collections.abc import Iterator
from math import log, log2

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.banks import attend_groups, join_banks
from foveate.mechanisms.routed.combiner import Combiner, Variant

NAMES: dict[Variant, str] = {"sqrt": "fixed", "logn": "logsparse", "mixture": "axial mixture"}


def _pairs(variant: Variant, n: int) -> int:
    module = Combiner(dim=64, heads=1, variant=variant, causal=True)
    q = torch.zeros(1, 1, n, 64)
    groups = module.banks(q, q, q, Grid(n))
    return sum(explain(q, **join_banks(group, n)._asdict()).pairs_needed for group in groups)


def figures() -> Iterator[Figure]:
    """Reach and growth of the factorisations."""
    n = 144
    for variant, name in NAMES.items():
        torch.manual_seed(0)
        module = Combiner(dim=32, heads=2, variant=variant, causal=True)
        q, k, _ = module.qkv(torch.randn(1, n, 32))
        eye = torch.eye(n).expand(1, 2, n, n)
        with torch.no_grad():
            seen = attend_groups(q, module.banks(q, k, eye, Grid(n))) > 0
        share = int(seen.sum()) / (n * (n + 1))
        yield Figure(
            claim=f"positions of the past with a positive weight, {name}",
            paper="all (full attention capability in each head)",
            ours=f"{share:.0%}",
            how=f"causal, N = {n}, random weights; values are unit vectors",
        )
    growth: dict[Variant, str] = {"sqrt": "O(L sqrt(L))", "mixture": "O(L sqrt(L))", "logn": "O(L log L)"}
    for variant, paper in growth.items():
        small, large = _pairs(variant, 1024), _pairs(variant, 4096)
        grown = log(large / small) / log(4)
        yield Figure(
            claim=f"growth of attended pairs, {NAMES[variant]}",
            paper=paper,
            ours=f"L^{grown:.2f}" if variant != "logn" else f"{large / (4096 * log2(4096)):.2f} L log2(L)",
            how=f"causal; {large:,} pairs of {4096 * 4097 // 2:,} at L = 4096"
            + ("" if variant == "logn" else ", compared with L = 1024"),
        )
