"""MaxViT: the authors' TensorFlow block (their weight layouts), and the partitions of timm's port; channels last."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.local.maxvit import MaxViTBlock, PartitionBlock


def partition(vector):
    config = vector.config
    heads = config["dim"] // config["dim_head"]
    module = PartitionBlock(
        dim=config["dim"],
        heads=heads,
        window=config["window_size" if config["partition_type"] == "block" else "grid_size"],
        partition=config["partition_type"],
        mlp_ratio=config.get("expand_ratio", 4),
        qkv_bias=vector.has("param.attn.qkv.bias"),
    )
    rename = {
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "attn.rel_pos.relative_position_bias_table": "attn.position.table",
    }
    given = {}
    if config.get("head_first", False):
        for name in vector.names("param"):
            if name.startswith("attn.qkv."):
                rows = vector.param(name).unflatten(0, (heads, 3, -1))
                given[name] = rows.transpose(0, 1).flatten(0, 2)
    vector.load(module, rename=rename, given=given)
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    return {"out": module(x.flatten(1, 2), grid).unflatten(1, grid.sizes)}


def tf_block(vector):
    config = vector.config
    x = vector.input("x")
    module = MaxViTBlock(
        dim=x.shape[-1],
        dim_out=config["hidden_size"],
        heads=config["hidden_size"] // config["head_size"],
        window=config["window_size"],
        lattice=config["grid_size"],
        stride=config["pool_stride"],
        expansion=config["expansion_rate"],
        squeeze=config.get("se_ratio", 0.25),
    ).eval()
    root = vector.names("param")[0].split("/")[0]
    given = {}

    def param(name):
        return vector.param(f"{root}/{name}")

    for ours, theirs in (("pre_norm", "pre_norm"), ("norm1", "expand_norm"), ("norm2", "depthwise_norm")):
        for end, their_end in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            given[f"conv.{ours}.{end}"] = param(f"mbconv/{theirs}/{their_end}")
    convolutions = {
        "expand": "expand_conv",
        "shrink": "shrink_conv",
        "se.0": "se/reduce_conv2d",
        "se.2": "se/expand_conv2d",
        "shortcut": "shortcut_conv",
    }
    for ours, theirs in convolutions.items():
        if vector.has(f"param.{root}/mbconv/{theirs}/kernel"):
            given[f"conv.{ours}.weight"] = param(f"mbconv/{theirs}/kernel").permute(3, 2, 0, 1)
        if vector.has(f"param.{root}/mbconv/{theirs}/bias"):
            given[f"conv.{ours}.bias"] = param(f"mbconv/{theirs}/bias")
    given["conv.depthwise.weight"] = param("mbconv/depthwise_conv/depthwise_kernel").permute(2, 3, 0, 1)
    for ours, end in (("attn_block", ""), ("attn_grid", "_1")):
        attention = f"attention{end}"
        weights = [param(f"{attention}/{name}/weight").flatten(1).t() for name in "qkv"]
        given[f"{ours}.attn.qkv.weight"] = torch.cat(weights)
        given[f"{ours}.attn.qkv.bias"] = torch.cat([param(f"{attention}/{n}/bias").flatten() for n in "qkv"])
        given[f"{ours}.attn.proj.weight"] = param(f"{attention}/o/weight").flatten(0, 1).t()
        given[f"{ours}.attn.proj.bias"] = param(f"{attention}/o/bias")
        given[f"{ours}.attn.position.table"] = param(f"{attention}/relative_bias")
        for norm, theirs in (("norm1", "attn_layer_norm"), ("norm2", "ffn_layer_norm")):
            given[f"{ours}.{norm}.weight"] = param(f"{theirs}{end}/gamma")
            given[f"{ours}.{norm}.bias"] = param(f"{theirs}{end}/beta")
        for layer, theirs in (("mlp.0", "expand_dense"), ("mlp.2", "shrink_dense")):
            given[f"{ours}.{layer}.weight"] = param(f"ffn{end}/{theirs}/weight").t()
            given[f"{ours}.{layer}.bias"] = param(f"ffn{end}/{theirs}/bias")
    keep = tuple(f"conv.{name}.num_batches_tracked" for name in ("pre_norm", "norm1", "norm2"))
    vector.load(module, given=given, keep=keep)
    return {"out": module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


PARTS = {"block_attention*": partition, "grid_attention*": partition, "tf_block*": tf_block}
