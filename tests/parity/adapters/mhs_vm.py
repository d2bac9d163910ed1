"""MHS-VM's scan module and its gated and ungated layers -> ours."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.linear.mhs_vm import FAMILIES, MHSVM, MultiHeadScan, family

HEADS = "CXSZ"  # the authors' letters of our families
STACKED = {
    "x_proj": "x_proj_weight",
    "dt_proj": "dt_projs_weight",
    "dt_bias": "dt_projs_bias",
    "A_log": "A_logs",
    "D": "Ds",
}


def options(config):
    given = config.get("para_dict", {})
    heads = given.get("head_num", 3)
    return {
        "dim": config["d_model"],
        "routes": FAMILIES[:heads],
        "states": config.get("d_state", 16),
        "threshold": given.get("gfu_t", 0),
        "project": given.get("with_proj", True),
    }


def state_spaces(vector, module, at, ours):
    """The parameters of all heads, stacked. The authors register each engine twice and their projection too."""
    heads = len(module.routes)
    given = {}
    for name, theirs in STACKED.items():
        engines = [
            [vector.param(f"{at}scanhead_{h}.{where}.{theirs}") for h in HEADS[:heads]]
            for where in ("mambaeng", "scanning.seq2seq_engine")
        ]
        given[f"{ours}ssm.{name}"] = torch.cat(engines[0]).reshape(getattr(module.ssm, name).shape)
    vector.param(f"{at}x_ssproj_W")
    given[f"{ours}subspaces.weight"] = vector.param(f"{at}x_ssproj.weight")
    return given


def routes(grid):
    # Ours are the first, its reverse, the second, its reverse.
    walks = [path for name in FAMILIES for path in family(name, grid)[::2]]
    return torch.stack([torch.stack([path.order, path.inverse]) for path in walks])


def scan(vector):
    module = MultiHeadScan(**options(vector.config)).eval()
    vector.load(
        module,
        rename={"cat_norm": "norm", "y_proj": "proj"},
        given=state_spaces(vector, module, "", ""),
    )
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid).unflatten(1, grid.sizes)
    return {"out.out": out, "out.routes": routes(grid)}


def layer(vector):
    config = vector.config
    gated = vector.has("param.in_proj.weight")
    module = MHSVM(**options(config), conv=config.get("d_conv", 3), gated=gated).eval()
    vector.load(
        module,
        rename={
            "conv2d": "conv",
            "out_norm": "norm",
            "mhs.cat_norm": "scan.norm",
            "mhs.y_proj": "scan.proj",
        },
        given=state_spaces(vector, module.scan, "mhs.", "scan."),
    )
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    return {"out.out": module(x.flatten(1, 2), grid).unflatten(1, grid.sizes), "out.routes": routes(grid)}


PARTS = {"mhsm*": scan, "block*": layer}
