"""SG-Former: the authors' one class with and without a mask; their second map is flattened column by column."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.routed.sg_former import (
    RATES,
    EnhancedAttention,
    GuidedAttention,
    HybridScaleAttention,
)

RENAME = {"lepe_linear": "lepe.linear", "lepe_conv": "lepe.conv"}


def options(config):
    return {"dim": config["dim"], "heads": config["num_heads"], "qkv_bias": config.get("qkv_bias", False)}


def hybrid(vector):
    config = vector.config
    grid, reduction = Grid(config["H"], config["W"]), config["sr_ratio"]
    if reduction == 1:
        module = EnhancedAttention(**options(config)).eval()
        vector.load(module, rename=RENAME)
        return {"out.out" if vector.has("out.out") else "out": module(vector.input("x"), grid)}
    module = HybridScaleAttention(reduction=reduction, **options(config)).eval()
    vector.load(module, rename=RENAME)
    out, significance = module.forward_significant(vector.input("x"), grid)
    turned = significance.unflatten(1, grid.sizes).transpose(1, 2).flatten(1)
    results = {"out": out, "out.out": out, "out.mask_1": significance, "out.mask_2": turned}
    return {name: value for name, value in results.items() if vector.has(name)}


def guided(vector):
    config = vector.config
    grid = Grid(config["H"], config["W"])
    module = GuidedAttention(rates=RATES[config["sr_ratio"]], **options(config)).eval()
    levels = {"f1": "merge.levels.0", "f2": "merge.levels.1", "f3": "merge.levels.2"}
    vector.load(module, rename=RENAME | levels)
    turned = vector.input("mask_2").unflatten(1, (grid[1], grid[0])).transpose(1, 2).flatten(1)
    significance = torch.stack([vector.input("mask_1"), turned], dim=1)
    out = module(vector.input("x"), grid, significance)
    return {"out.out" if vector.has("out.out") else "out": out}


def either(vector):
    return guided(vector) if vector.config.get("mask") else hybrid(vector)


PARTS = {"hybrid*": hybrid, "guided*": guided, "last*": hybrid, "attn*": either}
