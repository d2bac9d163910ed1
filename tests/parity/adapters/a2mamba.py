"""A2Mamba's mixer in both modes. Both halves share one table, listed twice; angles of ours are compared, not taken."""

from foveate.core.grid import Grid
from foveate.mechanisms.linear.a2mamba import A2Mamba

NAMES = {
    "rpb.0": "table",
    "rpb.2": "pair_bias",
    "ssm.conv2d": "ssm.conv",
    "ssm.x_proj_weight": "ssm.x_proj.weight",
    "ssm.dt_projs_weight": "ssm.dt_proj.weight",
    "ssm.dt_projs_bias": "ssm.dt_proj.bias",
    "ssm.A_logs": "ssm.A_log",
    "ssm.Ds": "ssm.D",
}


def mixer(vector):
    config, x = vector.config, vector.input("x")
    size = config.get("image_size")
    module = A2Mamba(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        window=config.get("window_size", 7),
        dilation=config.get("window_dilation", 1),
        form="global" if config.get("global_mode") else "states",
        grid=Grid(*size) if size else None,
        bias=config.get("use_rpb", False),
        official=True,
    ).eval()
    vector.load(module, rename=NAMES)
    out = {"out": module(x)}
    if vector.has("param.rpb.1"):
        out["param.rpb.1"] = module.table
    cos, sin = module.turns(Grid(*x.shape[2:]), x)
    for name, turn in (("in.cos", cos), ("in.sin", sin)):
        out[name] = turn.unsqueeze(-1).expand(-1, -1, 2).flatten(1).unflatten(0, x.shape[2:])
    return out


PARTS = {"mass*": mixer, "global*": mixer}
