"""PPMA: maps are channels-last; q, k, v have a projection each, which ours holds as one."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.scored.polyline_path_attention import PolylinePathAttention, PolylinePathBlock

RENAME = {
    "out_proj": "proj",
    "lepe.conv": "lepe",
    "path_embed.dt_linear": "factors.steps",
    "path_embed.dt_bias": "factors.bias",
    "path_embed.A_log": "factors.log_rate",
}
BLOCK = {
    "pos.conv": "position",
    "retention_layer_norm": "norm1",
    "final_layer_norm": "norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "ffn.dwconv.conv": "mlp.conv",
}


def joint(vector, prefix=""):
    """The three projections as one."""
    return {
        f"qkv.{kind}": torch.cat([vector.param(f"{prefix}{name}_proj.{kind}") for name in "qkv"])
        for kind in ("weight", "bias")
    }


def angles(vector, attention, grid):
    """Our cosines and sines, every number twice, beside those the authors hand over."""
    found = {}
    for name, table in zip(("cos", "sin"), attention.rotation(grid), strict=True):
        if vector.has(f"rel_pos.{name}"):
            found[f"rel_pos.{name}"] = table.unsqueeze(-1).expand(-1, -1, 2).reshape(*grid.sizes, -1)
    return found


def attention(vector, form):
    config = vector.config
    module = PolylinePathAttention(dim=config["embed_dim"], heads=config["num_heads"], form=form).eval()
    vector.load(module, rename=RENAME, given=joint(vector))
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    tokens = x.flatten(1, 2)
    results = {"out": module(tokens, grid).reshape(x.shape), **angles(vector, module, grid)}
    across, down = module.lines(tokens, grid)
    if vector.has("out.mask"):
        results["out.mask"] = module.log_mask(tokens, grid)
    if vector.has("out.mask_w"):
        results["out.mask_w"] = across.unflatten(2, grid.sizes).transpose(1, 2)
    if vector.has("out.mask_h"):
        results["out.mask_h"] = down.unflatten(2, grid.sizes).permute(0, 3, 1, 2, 4)
    return results


def whole(vector):
    return attention(vector, "whole")


def chunk(vector):
    return attention(vector, "chunk")


def block(vector):
    config = vector.config
    module = PolylinePathBlock(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        hidden=config["ffn_dim"],
        form=config["retention"],
        layer_scale=1.0 if config.get("layerscale") else None,
    ).eval()
    given = {f"attn.{name}": value for name, value in joint(vector, "retention.").items()}
    if config.get("layerscale"):
        given.update({f"scale{i}": vector.param(f"gamma_{i}").flatten() for i in (1, 2)})
    rename = BLOCK | {f"retention.{theirs}": f"attn.{ours}" for theirs, ours in RENAME.items()}
    vector.load(module, rename=rename, given=given)
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    return {"out": module(x.flatten(1, 2), grid).reshape(x.shape), **angles(vector, module.attn, grid)}


PARTS = {"whole*": whole, "chunk*": chunk, "block*": block}
