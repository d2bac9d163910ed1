"""PSA: the authors' kernels over given levels, and how levels are made from importance."""

from foveate.mechanisms.routed.pyramid_sparse_attention import level_ends, pyramid_attention
from foveate.routing.blocks import rank_levels
from foveate.routing.levels import alignment, keep_last, rank_lists, similar_levels


def kernel(vector):
    config = vector.config
    out = pyramid_attention(
        vector.input("q"),
        vector.input("k"),
        vector.input("v"),
        vector.take("in.mask").long(),
        blocks=(config["BLOCK_M"], config["POOLING_BLOCK_N"]),
        masked=config.get("causal", False),
        official=True,
        scale=config["sm_scale"],
    )
    return {"out": out}


def masks(vector):
    config = vector.config
    scores, block = vector.take("in.attn"), config["blocksize"]
    shares = {int(level): pair[1] for level, pair in config["mask_ratios"].items()}
    align = alignment(shares, block, config["compute_tile"])
    results = {}
    for name, mode in (("topk", "rank"), ("thresholdbound", "mass")):
        order = shares if mode == "rank" else dict(sorted(shares.items(), key=lambda item: item[1]))
        ends = level_ends(scores, order, mode=mode, align=align)
        levels = rank_levels(scores, ends, list(order))
        results[f"out.{name}"] = keep_last(levels, config.get("text_length", 0), block)
        results[f"out.{name}_newtype"] = rank_lists(scores, ends)
    if vector.has("in.k"):
        size = config["sim"]["blocksize"]
        whole = vector.take("in.k").shape[2] // size * size
        thresholds = {level: config["sim"][f"sim_{level}x_threshold"] for level in (2, 4, 8)}
        results["out.sim_mask"] = similar_levels(vector.take("in.k")[:, :, :whole], size, thresholds)
    return {name: value for name, value in results.items() if vector.has(name)}


PARTS = {"kernel*": kernel, "causal*": kernel, "masks*": masks}
