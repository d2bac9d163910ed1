"""NATTEN's functions with strides, and its module: (B, *layout, C) <-> (B, N, C)."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.generalized_neighborhood import GeneralizedNeighborhoodAttention
from tests.parity.adapters.fused_neighborhood_attention import generic


def module(vector):
    config = vector.config
    x = vector.input("x")
    grid = Grid(*x.shape[1:-1])
    ours = GeneralizedNeighborhoodAttention(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        window=config["kernel_size"],
        stride=config.get("stride", 1),
        dilation=config.get("dilation", 1),
        causal=config.get("is_causal", False),
        qkv_bias=vector.has("param.qkv.bias"),
        scale=config.get("qk_scale"),
    )
    vector.load(ours)
    return {"out": ours(x.flatten(1, -2), grid).unflatten(1, grid.sizes)}


PARTS = {"": generic, "module*": module, "additional_kv*": generic}
