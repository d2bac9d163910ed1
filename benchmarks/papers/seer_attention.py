"""SeerAttention (arXiv 2410.13276): what 90 % sparsity leaves at 32k tokens, and what the gate costs."""

from collections.abc import Iterator

import torch

from benchmarks.papers import Figure
from foveate.cost.explain import explain
from foveate.mechanisms.block_gate import BlockGate, choose_blocks
from foveate.routing.blocks import causal_blocks, select_blocks

N, BLOCK, WIDTH, LAYERS, HEADS, KV_HEADS = 32768, 64, 128, 32, 32, 8


def figures() -> Iterator[Figure]:
    """Yield the figures."""
    blocks = N // BLOCK
    allowed = causal_blocks(N, N, BLOCK, BLOCK)
    logits = torch.randn(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0))
    logits = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)
    chosen = choose_blocks(logits, allowed, ratio=0.1, dense_rows=2)
    where = select_blocks(chosen, BLOCK, BLOCK, N, N, causal=True)
    shape = (1, 1, N, WIDTH)
    found = explain(shape, shape, shape, where=where, backend="tiles")
    triangle = N * (N + 1) // 2
    how = (
        f"{N} tokens, blocks of {BLOCK}, nz_ratio 0.1, the last two rows of blocks dense, random gate logits"
    )
    yield Figure(
        claim="sparsity of the causal map at 32k tokens",
        paper="90%",
        ours=f"{1 - found.pairs_needed / triangle:.1%}",
        how=how,
    )
    gate_pairs = blocks * blocks // 2
    # A pair of tokens costs two products of `WIDTH`, a pair of blocks one, and pooling reads every token once.
    gate = gate_pairs * WIDTH + 4 * N * WIDTH
    bound = triangle * 2 * WIDTH / (found.pairs_computed * 2 * WIDTH + gate)
    yield Figure(
        claim="speed-up over dense causal attention",
        paper="5.67x over FlashAttention-2, measured on a GPU",
        ours=f"at most {bound:.2f}x",
        how=f"{how}; pairs that cells hold, and the gate's products, against half of all pairs",
    )
    module = BlockGate(heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, gate_dim=WIDTH)
    per_layer = sum(p.numel() for p in module.parameters())
    yield Figure(
        claim="parameters of the gates, and their share of the model",
        paper="not given",
        ours=f"{LAYERS * per_layer / 1e6:.1f} M, {LAYERS * per_layer / 8.03e9:.2%}",
        how=f"Qavg_Kmaxminavg, {LAYERS} layers of {HEADS} heads of {WIDTH}, {KV_HEADS} key heads; a model of 8.03 B",
    )
