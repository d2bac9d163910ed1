"""STViT: maps (B, C, H, W) <-> tokens, 1x1 convolutions -> linear maps, q | k | v inside each head -> outside."""

from foveate.core.grid import Grid
from foveate.mechanisms.routed.super_token_attention import SuperTokenAttention, SuperTokenLayer
from foveate.patterns.basic import SlidingWindow


def refine(vector, config, prefix=""):
    """The authors' attention among super tokens in our names."""
    heads, ours = config["num_heads"], {}
    for name in ("weight", "bias") if config.get("qkv_bias", True) else ("weight",):
        # Rows of the authors: head, then q | k | v, then channel.
        rows = vector.param(f"{prefix}stoken_refine.qkv.{name}").flatten(1 if name == "weight" else 0)
        rows = rows.unflatten(0, (heads, 3, -1))
        ours[f"{prefix}qkv.{name}"] = rows.transpose(0, 1).flatten(0, 2)
    ours[f"{prefix}proj.weight"] = vector.param(f"{prefix}stoken_refine.proj.weight").flatten(1)
    ours[f"{prefix}proj.bias"] = vector.param(f"{prefix}stoken_refine.proj.bias")
    return ours


def frozen_kernels(vector, prefix=""):
    """The authors' frozen kernels of unfolding and folding: each of 9 neighbours by itself."""
    alone = SlidingWindow(0).dense(9).float().unflatten(1, (1, 3, 3))
    names = [f"param.{prefix}{part}.weights" for part in ("unfold", "fold")]
    return {name: alone for name in names if vector.has(name)}


def options(config):
    return {
        "dim": config["dim"],
        "heads": config["num_heads"],
        "cell": config["stoken_size"],
        "iterations": config.get("n_iter", 1),
        "qkv_bias": config.get("qkv_bias", True),
        "official": True,
    }


def on_map(module, x):
    grid = Grid(*x.shape[2:])
    return module(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid.sizes)


def attn(vector):
    module = SuperTokenAttention(**options(vector.config)).eval()
    vector.load(module, given=refine(vector, vector.config))
    return {"out": on_map(module, vector.input("x"))} | frozen_kernels(vector)


def layer(vector):
    config = vector.config
    scaled = vector.has("param.gamma_1")
    module = SuperTokenLayer(
        mlp_ratio=config.get("mlp_ratio", 4.0), layer_scale=1.0 if scaled else None, **options(config)
    ).eval()
    given = refine(vector, config, "attn.")
    if scaled:
        given = given | {f"gamma{i}": vector.param(f"gamma_{i}").flatten() for i in (1, 2)}
    rename = {"norm1.norm": "norm1", "mlp2.fc1": "mlp.0", "mlp2.conv": "mlp.2", "mlp2.fc2": "mlp.3"}
    vector.load(module, rename=rename, given=given)
    return {"out": on_map(module, vector.input("x"))} | frozen_kernels(vector, "attn.")


PARTS = {"attn*": attn, "layer*": layer}
