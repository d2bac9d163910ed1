"""TransNormerLLM (arXiv 2307.14995): parameters of the released configuration, cost of a token, decoding's state."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.cost.render import amount
from foveate.kernels.flops import count_flops
from foveate.mechanisms.past import past_bytes
from foveate.models.language import transnormer_llm

# The authors' configuration class: 24 layers, 1024 channels, 8 heads, units of 2816, 64000 tokens.
LAYERS, DIM = 24, 1024
SHORT, LONG = 1024, 8192
# Bytes kept are told for a usual and for a long context.
USUAL, FAR = 2048, 131072


def figures() -> Iterator[Figure]:
    """Yield parameters, operations per token in training and decoding, and bytes kept."""
    with torch.device("meta"):
        model = transnormer_llm()
    how = f"the defaults of the authors' configuration: {LAYERS} layers, {DIM} channels, 8 heads, vocabulary 64000"
    total = sum(p.numel() for p in model.parameters())
    table = model.embed.weight.numel()
    yield Figure(
        claim="parameters of the smallest released model",
        paper="385M (0.39B in the authors' table)",
        ours=f"{(total - table) / 1e6:.1f}M with one table of tokens, {total / 1e6:.1f}M with embedding and head",
        how=f"{how}; the 385M model's own configuration file was not at hand",
    )
    per_token, step, caches = {}, {}, None
    with torch.no_grad():
        for n in (SHORT, LONG):
            tokens = torch.zeros(1, n, dtype=torch.long, device="meta")
            per_token[n] = count_flops(model, tokens) / n
            _, caches = model.prefill(tokens)
            step[n] = count_flops(model.step, tokens[:, 0], caches)
    yield Figure(
        claim=f"FLOPs per token of a forward pass at {LONG} tokens, over those at {SHORT}",
        paper="linear in the length",
        ours=f"{per_token[LONG] / per_token[SHORT]:.2f} ({amount(per_token[SHORT], 'FLOP')} a token)",
        how=f"{how}; counted",
    )
    dense = {n: step[n] + LAYERS * 4 * DIM * n for n in (SHORT, LONG)}
    yield Figure(
        claim=f"FLOPs of decoding one token after {LONG} tokens, over those after {SHORT}",
        paper="consistent inference speed, whatever the length",
        ours=f"{step[LONG] / step[SHORT]:.2f} ({amount(step[LONG], 'FLOP')}); "
        f"{dense[LONG] / dense[SHORT]:.2f} with full attention",
        how=f"{how}; counted; full attention: the same maps, and all keys read",
    )
    state = past_bytes(caches)
    keys = {n: LAYERS * 2 * DIM * 2 * n for n in (USUAL, FAR)}
    yield Figure(
        claim=f"bytes that decoding keeps per sequence after {USUAL} and {FAR} tokens",
        paper="constant in the length",
        ours=f"{amount(state, 'B')}; keys and values {amount(keys[USUAL], 'B')} and {amount(keys[FAR], 'B')}",
        how=f"{how}; the state in float32, keys and values in bfloat16",
    )
