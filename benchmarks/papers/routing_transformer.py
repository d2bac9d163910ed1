"""Routing Transformer (arXiv 2003.05997): pairs of clustered attention, and what they hold on real maps."""

import math
from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from benchmarks.papers._maps import HOW, captured, line
from foveate.mechanisms.routed.routing_transformer import ClusterRouting
from foveate.routing.clusters import on_sphere

LENGTHS = (1024, 4096)


def pairs(n: int) -> int:
    """Count the pairs of one head with sqrt(n) clusters of sqrt(n) members, and the products with centroids."""
    clusters = math.isqrt(n)
    torch.manual_seed(0)
    routing = ClusterRouting(heads=1, width=16, clusters=clusters, members=n // clusters)
    q, k = (on_sphere(torch.randn(1, 1, n, 16)) for _ in range(2))
    return routing.select(q, k).schedule.pairs_computed + 2 * n * clusters


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    small, large = (pairs(n) for n in LENGTHS)
    yield Figure(
        claim="p in pairs ~ n^p, centroids included",
        paper="1.5",
        ours=f"{math.log(large / small) / math.log(LENGTHS[1] / LENGTHS[0]):.3f}",
        how="sqrt(n) clusters of n / sqrt(n) members, 1024 and 4096 tokens, counted",
    )
    yield Figure(
        claim="pairs over those of dense attention, 8192 tokens",
        paper="not given",
        ours=f"{pairs(8192) / 8192**2:.2%}",
        how="90 clusters of 91 members, products with centroids included",
    )
    names = ("clusters", "window")
    found = captured(names, (0.05,))
    if found is not None:
        yield Figure(
            claim="attention mass on clustered pairs, and on a window of as many keys",
            paper="routed heads attend further than local ones; not given as mass",
            ours=line(found, names),
            how=f"{HOW}; 80 clusters of 13 members, five steps of k-means on the very q and k for centroids learned "
            "in training",
        )
