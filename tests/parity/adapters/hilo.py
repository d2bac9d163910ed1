"""HiLo: `h_` and `l_` are our high and low."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.hilo import HiLoAttention

RENAME = {
    "h_qkv": "high_qkv",
    "h_proj": "high_proj",
    "l_q": "low_q",
    "l_kv": "low_kv",
    "l_proj": "low_proj",
}


def attention(vector):
    config = vector.config
    module = HiLoAttention(
        dim=config["dim"],
        heads=config.get("num_heads", 8),
        window=config.get("window_size", 2),
        alpha=config.get("alpha", 0.5),
        qkv_bias=config.get("qkv_bias", False),
        scale=config.get("qk_scale"),
    )
    vector.load(module, rename=RENAME)
    return {"out": module(vector.input("x"), Grid(config["H"], config["W"]))}


PARTS = {"": attention, "*": attention}
