"""NATTEN's module with a relative position bias: (B, H, W, C) <-> (B, N, C); rpb is our position.table."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.dilated_neighborhood import DilatedNeighborhoodAttention


def attention(vector):
    config = vector.config
    x = vector.input("x")
    grid = Grid(*x.shape[1:-1])
    dilation = config.get("dilation") or 1
    module = DilatedNeighborhoodAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        window=(config["kernel_size"],) * grid.ndim,
        dilation=dilation,
        qkv_bias=vector.has("param.qkv.bias"),
        bias=vector.has("param.rpb"),
        scale=config.get("qk_scale"),
    )
    vector.load(module, rename={"rpb": "position.table"})
    return {"out": module(x.flatten(1, -2), grid).unflatten(1, grid.sizes)}


PARTS = {"attention*": attention}
