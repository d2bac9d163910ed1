"""GAAM (arXiv 2401.11143): parameters of the gate beside those of dot-product attention."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.mechanisms.baseline.full_attention import FullAttention
from foveate.mechanisms.scored.gaussian_adaptive_attention import GaussianBlock

DIM, HEADS = 768, 12


def figures() -> Iterator[Figure]:
    """Yield the parameters of the authors' example block, and of one layer of attention."""
    block, attention = GaussianBlock(), FullAttention(dim=DIM, heads=HEADS)
    count, dense = (sum(p.numel() for p in module.parameters()) for module in (block, attention))
    yield Figure(
        claim="parameters of the block of the authors' example, and of one layer of attention",
        paper='"relatively low number of parameters"',
        ours=f"{count}; {dense}",
        how=f"3 layers of 4 heads with 5 Gaussians; attention of {DIM} channels and {HEADS} heads",
    )
