"""RALA's attention and block; official names except for the norms. Angles of ours are compared, not taken."""

from foveate.core.grid import Grid
from foveate.mechanisms.linear.rala import RALA, RALABlock

FORMS = {"l": "linear", "v": "softmax"}


def tables(vector, module, x):
    """Cosines and sines as the authors hand them round: (N, D), every angle twice."""
    cos, sin = module.turns(Grid(*x.shape[2:]), x)
    twice = {"in.cos": cos, "in.sin": sin}
    return {name: t.unsqueeze(-1).expand(-1, -1, 2).flatten(1) for name, t in twice.items()}


def attn(vector):
    config, x = vector.config, vector.input("x")
    module = RALA(dim=config["dim"], heads=config["num_heads"]).eval()
    vector.load(module)
    return {"out": module(x), **tables(vector, module, x)}


def block(vector):
    config, x = vector.config, vector.input("x")
    scaled = config.get("layerscale", False)
    module = RALABlock(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        hidden=config["ffn_dim"],
        form=FORMS[config["flag"]],
        layer_scale=config.get("layer_init_value", 1e-6) if scaled else None,
    ).eval()
    vector.load(module, rename={"norm1.norm": "norm1", "norm2.norm": "norm2"})
    return {"out": module(x), **tables(vector, module.attn, x)}


PARTS = {"attn*": attn, "block*": block}
