"""Key-driven GQA (arXiv 2408.08454): keys and values against full attention, and how uneven groups become."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.core.grid import Grid
from foveate.kernels.select import watch_plans
from foveate.mechanisms.scored.key_driven_gqa import KeyDrivenAttention

# Channels and heads of the vision transformers in the paper.
HOSTS = {"ViT-S": (384, 6), "ViT-B": (768, 12), "ViT-L": (1024, 16)}


def figures() -> Iterator[Figure]:
    """Yield bytes of keys and values, parameters, and the cost of uneven groups."""
    for name, (dim, heads) in HOSTS.items():
        with torch.device("meta"):
            ours, full = (KeyDrivenAttention(dim=dim, heads=heads, kv_heads=g) for g in (heads // 2, heads))
        cached = (ours.k.out_features + ours.v.out_features) / (full.k.out_features + full.v.out_features)
        counts = [sum(p.numel() for p in module.parameters()) for module in (ours, full)]
        yield Figure(
            claim=f"{name}: keys and values of a layer, and its parameters, over those of full attention",
            paper="G / H, half as many key heads",
            ours=f"{cached:.0%}, {counts[0] / counts[1]:.0%}",
            how=f"{dim} channels, {heads} heads, {heads // 2} key heads",
        )
    dim, heads = HOSTS["ViT-B"]
    torch.manual_seed(0)
    module = KeyDrivenAttention(dim=dim, heads=heads, groups="kdgqa").eval()
    with watch_plans() as plans, torch.no_grad():
        module(torch.randn(8, 197, dim), Grid(197))
    used = sum(plan.kv_heads for plan in plans)
    yield Figure(
        claim="key heads that get queries in KDGQA, and attention calls for them",
        paper="not given",
        ours=f"{used} of {heads // 2}, {len(plans)}",
        how="ViT-B's layer before training, 8 samples of 197 random tokens; the smallest norm has no share",
    )
