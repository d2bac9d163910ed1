"""Combiner in Flax: kernels (E, H, d) and (H, d, E) -> rows of a Linear."""

from torch import cat

from foveate.core.grid import Grid
from foveate.mechanisms.routed.combiner import Combiner


def layer(vector, variant):
    config = vector.config
    module = Combiner(
        dim=config["features"],
        heads=config["num_heads"],
        variant=variant,
        segment=config["max_seg_len"],
        causal=config["causal"],
        official=True,
    ).eval()
    inwards = [vector.param(f"{name}.kernel").flatten(1).t() for name in ("query", "key", "value")]
    dense = sorted(name for name in vector.names("param") if name.startswith("DenseGeneral_"))
    given = {"qkv.weight": cat(inwards), "proj.weight": vector.param(dense[-1]).flatten(0, 1).t()}
    if variant == "rowmajor":
        given["mix.weight"] = vector.param(dense[0]).flatten(0, 1).t()
        given["key_row.weight"] = vector.param(dense[1]).flatten(1).t()
    vector.load(
        module, rename={"LayerNorm_0.scale": "norm.weight", "LayerNorm_0.bias": "norm.bias"}, given=given
    )
    return {"out": module(vector.input("x"), Grid(config["max_len"]))}


def sqrt(vector):
    return layer(vector, "sqrt")


def logn(vector):
    return layer(vector, "logn")


def rowmajor(vector):
    return layer(vector, "rowmajor")


def mixture(vector):
    return layer(vector, "mixture")


PARTS = {"sqrt*": sqrt, "logn*": logn, "rowmajor*": rowmajor, "mixture*": mixture}
