"""RCMHA (arXiv 2308.03429): what the convolutions and the position terms add in parameters."""

from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.mechanisms.scored.rcmha import RelativeConvolutionalAttention

DIM, HEADS, REACH = 128, 8, 4096


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    layer = RelativeConvolutionalAttention(dim=DIM, heads=HEADS, max_distance=REACH)
    count = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    convolutions = sum(n for name, n in count.items() if "_conv" in name)
    positions = count["table"] + count["offset_bias"] + count["query_bias"]
    plain = sum(count.values()) - convolutions - positions
    setting = f"one layer of the authors' run: D = {DIM}, {HEADS} heads, offsets up to {REACH}"
    yield Figure(
        claim="parameters of the convolutions over those of the projections",
        paper="not given",
        ours=f"{convolutions} of {plain:,} ({convolutions / plain:.2%})",
        how=setting,
    )
    yield Figure(
        claim="parameters of the position terms over those of the projections",
        paper="not given",
        ours=f"{positions:,} ({positions / plain:.1f} times)",
        how=f"{setting} on either side; {plain // (2 * (DIM + HEADS))} would take as many as the projections",
    )
