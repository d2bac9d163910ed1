"""Sparsifiner: the authors' thresholds as a Sparsity; the patches are a line, as only their number counts."""

from foveate.core.grid import Grid
from foveate.mechanisms.routed.sparsifiner import SparsifinerAttention
from foveate.routing.lowrank import Sparsity


def sparsity(config):
    options = config.get("cfg", {})
    coefficients, score = options.get("BASIS_COEF", {}), options.get("ATTN_SCORE", {})
    return Sparsity(
        keep=config.get("attn_keep_rate", 0.25),
        coefficients=coefficients.get("TOPK", 8) if coefficients.get("USE_TOPK", True) else None,
        coefficient_threshold=coefficients.get("THRESHOLD", 0.0),
        basis_threshold=options.get("BASIS_THRESHOLD", 0.02),
        score_threshold=None if score.get("USE_TOPK", True) else score.get("THRESHOLD", 0.0),
        prune_rows=options.get("PRUNE_ATTN_MATRIX_ROW", False),
    )


def attention(vector):
    config = vector.config
    grid = Grid(config["num_tokens"] - 1)
    prunes = config.get("token_pruning_this_layer", False)
    module = SparsifinerAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        grid=grid,
        class_token=True,
        sparsity=sparsity(config),
        reduce_n=config.get("reduce_n_factor", 8),
        reduce_c=config.get("reduce_c_factor", 2),
        share_basis=config.get("share_inout_proj", False),
        token_keep=config.get("token_keep_rate", 0.5) if prunes else None,
        qkv_bias=config.get("qkv_bias", False),
        official=True,
    ).eval()
    vector.load(module, rename={"mask_predictor": "predictor"})
    x = vector.input("x")
    kept = vector.take("in.prev_token_mask") if vector.has("in.prev_token_mask") else None
    out, left = module.forward_pruned(x, grid, kept=kept)
    prediction = module.predict(x, grid, kept=kept)
    results = {
        "out": out,
        "out.out": out,
        "out.attn_mask": prediction.where.dense().to(x.dtype),
        "out.basis_coef": prediction.coefficients,
        "out.approx_attn": prediction.matrix(),
        "out.masked_attn": module.attention_map(x, grid, kept=kept),
        "out.token_mask": left,
    }
    return {name: value for name, value in results.items() if vector.has(name)}


PARTS = {"attn*": attention, "token_pruned*": attention}
