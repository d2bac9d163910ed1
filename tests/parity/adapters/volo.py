"""Outlook attention on maps, channels last: (B, H, W, C) <-> (B, N, C); the written weights are `attn`."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.volo import OutlookAttention, Outlooker


def options(config):
    return {
        "dim": config["dim"],
        "heads": config.get("num_heads", 1),
        "window": config.get("kernel_size", 3),
        "stride": config.get("stride", 1),
        "padding": config.get("padding", 1),
        "qkv_bias": config.get("qkv_bias", False),
        "scale": config.get("qk_scale"),
    }


def run(vector, module):
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    return {"out": module(x.flatten(1, 2), grid).unflatten(1, grid.sizes)}


def outlook_attention(vector):
    module = OutlookAttention(**options(vector.config))
    vector.load(module, rename={"attn": "weights"})
    return run(vector, module)


def outlooker(vector):
    module = Outlooker(mlp_ratio=vector.config.get("mlp_ratio", 3.0), **options(vector.config))
    vector.load(module, rename={"attn.attn": "attn.weights", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"})
    return run(vector, module)


PARTS = {"outlook_attention*": outlook_attention, "outlooker*": outlooker}
