"""The authors' TNL module (B, N, C) -> ours."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.linear.lightning_attention import LightningAttention


def module(vector):
    config = vector.config
    bias = vector.has("param.q_proj.bias")
    ours = LightningAttention(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        layer=config.get("layer_idx", 0),
        layers=config.get("num_layers", 12),
        bias=bias,
    )
    joined = {
        f"qkv.{name}": torch.cat([vector.param(f"{part}_proj.{name}") for part in "qkv"])
        for name in ("weight", *(["bias"] if bias else []))
    }
    vector.load(ours, rename={"o_proj": "proj", "output_gate": "gate"}, given=joined)
    x = vector.input("x")
    results = {"out": ours(x, Grid(x.shape[1]))}
    if vector.has("param.slope_rate"):
        results["param.slope_rate"] = ours.slopes.view(-1, 1, 1)
    return results


PARTS = {"tnl*": module}
