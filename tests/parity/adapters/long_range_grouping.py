"""Long-range grouping: views beside the batch, ((b v), n, c) <-> (b, (v h w), c)."""

import math

from torch import cat

from foveate.core.grid import Grid
from foveate.mechanisms.routed.long_range_grouping import LongRangeGrouping, SimilarTokenMerger


def lga(vector):
    config = vector.config
    views, grouped = config.get("view_num") or 1, config.get("lga", True)
    module = LongRangeGrouping(
        dim=config["dim"],
        heads=config["num_heads"],
        group=config.get("patch_group", 7),
        grouped=grouped,
        qkv_bias=config.get("qkv_bias", False),
    ).eval()
    parts = ("weight", "bias") if config.get("qkv_bias", False) else ("weight",)
    given = {f"qkv.{p}": cat([vector.param(f"to_{name}.{p}") for name in "qkv"]) for p in parts}
    if not grouped:  # their layer owns the convolution without using it
        for p in ("weight", "bias"):
            vector.param(f"IFS.{p}")
    vector.load(module, rename={"IFS": "signature"}, given=given)
    x = vector.input("x")
    side = math.isqrt(x.shape[1])
    out = module(x.unflatten(0, (-1, views)).flatten(1, 2), Grid(views, side, side))
    return {"out": out.unflatten(1, (views, -1)).flatten(0, 1)}


def stm(vector):
    config = vector.config
    module = SimilarTokenMerger(
        dim=config["dim"],
        heads=config["num_heads"],
        tokens=config["out_token_len"],
        neighbours=config["k"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", False),
        official=True,
    ).eval()
    rename = {"attention_layer.proj": "proj", "score_mlp": "score", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    vector.load(module, rename=rename | {f"attention_layer.to_{name}": name for name in "qkv"})
    out, labels = module(vector.input("x"))
    results = {"out.out": out, "out.idx_cluster": labels}
    return {name: value for name, value in results.items() if vector.has(name)} | (
        {"out": out} if vector.has("out") else {}
    )


PARTS = {"lga*": lga, "stm*": stm}
