"""The authors' gate, their pooled attention and their block-sparse kernel; (B, N, H, D) <-> (B, H, N, D)."""

import torch

from foveate.kernels.attend import attend
from foveate.mechanisms.block_gate import BlockGate, choose_blocks, true_blocks
from foveate.mechanisms.routed.seer_attention import block_sparse_attention
from foveate.patterns.basic import Causal
from foveate.routing.blocks import causal_blocks


def gate(vector):
    config = vector.config
    module = BlockGate(
        heads=config["num_q_head"],
        kv_heads=config["num_k_head"],
        width=config["in_channel_size"],
        gate_dim=config["hidden_size"],
        block=config["block_size"],
        pooling=config["gate_type"],
        double=config.get("force_double", False),
    )
    vector.load(module, rename={"mask_linear_q.weight": "q_weight", "mask_linear_k.weight": "k_weight"})
    q, k = vector.input("q").transpose(1, 2), vector.input("k").transpose(1, 2)
    turn = (vector.take("in.cos"), vector.take("in.sin")) if vector.has("in.cos") else None
    mask = vector.take("in.attention_mask")
    logits = module(q, k, mask, turn=turn)
    n, m, block = q.shape[2], k.shape[2], config["block_size"]
    allowed = causal_blocks(n, m, block, block)
    out = module.probabilities(q, k, mask, turn=turn)
    results = {"out": out, "out.out": out, "out.logits": logits}
    if vector.has("out.mask_threshold"):
        dense = 2 if config.get("last_block_dense", True) else 0
        results["out.mask_threshold"] = choose_blocks(
            logits, allowed, threshold=config["threshold"], dense_rows=dense
        )
    if vector.has("out.mask_nz_ratio"):
        results["out.mask_nz_ratio"] = choose_blocks(logits, allowed, ratio=config["nz_ratio"])
    return {name: value for name, value in results.items() if vector.has(name)}


def pooling(vector):
    config = vector.config
    q, k, v = (vector.input(name) for name in ("q", "k", "v"))
    scale, causal = config["sm_scale"], config["causal"]
    truth = true_blocks(q, k, config["block_size"], causal=causal, scale=scale)
    results = {
        "out.out": attend(q, k, v, where=Causal() if causal else None, scale=scale),
        "out.ground_truth": truth,
        "out.ground_truth_exact": truth,
    }
    return {name: value for name, value in results.items() if vector.has(name)}


def sparse(vector):
    config = vector.config
    q, k, v = (vector.input(name) for name in ("q", "k", "v"))
    chosen = vector.take("in.block_sparse_mask").to(torch.bool)
    out = block_sparse_attention(q, k, v, chosen, config["block_size"], scale=config["sm_scale"])
    return {"out" if vector.has("out") else "out.out": out}


PARTS = {"gate*": gate, "pooling*": pooling, "sparse*": sparse}
