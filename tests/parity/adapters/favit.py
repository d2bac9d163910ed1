"""FaSA: the authors keep the parts of the local groups in lists of their own."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.favit import FactorizedAttention

RENAME = {
    "sr": "reduce",
    "kv_g": "kv",
    "local_conv_g": "local",
    "kv_l.depth_conv": "mix.0",
    "kv_l.point_conv": "mix.1",
}
LISTS = {"fcs": "fc", "single_heads": "kv", "local_convs": "local"}


def fasa(vector):
    config = vector.config
    module = FactorizedAttention(
        dim=config["dim"],
        heads=config.get("num_heads", 8),
        reduction=config.get("sr_ratio", 1),
        window=config.get("windowsize", 7),
        qkv_bias=config.get("qkv_bias", False),
        official=True,
    )
    groups = {
        f"{name}.{i}": f"groups.{i}.{ours}" for i in range(len(module.groups)) for name, ours in LISTS.items()
    }
    vector.load(module, rename=RENAME | groups)
    return {"out": module(vector.input("x"), Grid(config["H"], config["W"]))}


PARTS = {"fasa*": fasa}
