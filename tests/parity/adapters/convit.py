"""ConViT's GPSA: names are ours; tokens of a square map, whose side the authors take as sqrt(N)."""

from math import isqrt

from foveate.core.grid import Grid
from foveate.mechanisms.scored.convit import GatedPositionalAttention


def gpsa(vector):
    config = vector.config
    module = GatedPositionalAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        qkv_bias=config.get("qkv_bias", False),
        locality_strength=config.get("locality_strength", 1.0),
        local_init=config.get("use_local_init", True),
    ).eval()
    results = {}
    kernel = float(config["num_heads"]) ** 0.5
    for name in vector.names("init"):
        if name == "pos_proj.weight" and not kernel.is_integer():
            vector.take("init.pos_proj.weight")  # rows beyond the kernel are random
        else:
            results[f"init.{name}"] = module.state_dict()[name].clone()
    vector.load(module)
    x = vector.input("x")
    grid = Grid(isqrt(x.shape[1]), isqrt(x.shape[1]))
    results["out"] = module(x, grid)
    if vector.has("out.attn"):
        results["out.attn"] = module.attention_map(x, grid)
    if vector.has("out.nonlocality"):
        results["out.nonlocality"] = module.nonlocality(x, grid)
    if vector.has("rel_indices"):
        vector.take("rel_indices")
    return results


PARTS = {"gpsa*": gpsa}
