"""Extractors (arXiv 2308.07661): what the four variants cost beside self-attention. They are reconstructed."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.kernels.fir import choose_form, transform_length
from foveate.mechanisms.linear.extractors import Extractor, Variant

CLAIMS: dict[Variant, str] = {
    "she": "better than self-attention, no claim of being cheaper",
    "he": "less computation and memory than self-attention",
    "we": "less computation and memory than self-attention",
    "me": "less computation and memory than self-attention",
}


def figures() -> Iterator[Figure]:
    """Yield multiply-adds and parameters per variant, over those of self-attention."""
    n, dim = 1024, 256
    attention, weights = n * 4 * dim * dim + n * n * dim, 4 * dim * dim
    for variant, claim in CLAIMS.items():
        module = meta(variant, n, dim)
        cost, kept = multiply_adds(module, n), parameters(module)
        yield Figure(
            claim=f"{variant.upper()}: multiply-adds and parameters over those of self-attention",
            paper=f"no figure at hand; {claim}",
            ours=f"{cost / attention:.2f}, {kept / weights:.2f}",
            how=f"{n} tokens, {dim} channels, l = {n}, {form(module, n)} form, a complex product as three; causal "
            "attention at half its pairs. A reconstruction: the paper's own layers may cost something else",
        )


def meta(variant: Variant, length: int, dim: int) -> Extractor:
    """Return a layer without numbers."""
    with torch.device("meta"):
        return Extractor(dim=dim, length=length, variant=variant)


def parameters(module: Extractor) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def form(module: Extractor, n: int) -> str:
    """Return the form that "auto" takes."""
    return choose_form(n, module.dim, module.taps.shape)


def multiply_adds(module: Extractor, n: int) -> int:
    """Return those of one sequence; transforms of the taps are made once for a batch and left out."""
    maps = sum(
        linear.weight.numel() for linear in (module.value, module.adjust, module.proj) if linear is not None
    )
    pairs = module.dim**2 if module.taps.ndim == 3 else module.dim
    if form(module, n) == "direct":
        return n * maps + n * (n + 1) // 2 * pairs
    m = transform_length(n, module.length)
    return n * maps + 2 * module.dim * m * (m.bit_length() - 1) + 3 * (m // 2 + 1) * pairs
