"""VWA: 1 x 1 convolutions as linear maps, keys and values in one of them; one branch for each ratio."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.local.varying_window_attention import VaryingWindowBranch


def linear(vector, name, entry):
    return (
        vector.param(f"{name}.conv.{entry}").flatten(1)
        if entry == "weight"
        else vector.param(f"{name}.conv.{entry}")
    )


def branch(vector, index, ratio):
    config, name = vector.config, f"attn.{index}"
    module = VaryingWindowBranch(
        dim=config["channels"],
        heads=config["nheads"],
        ratio=ratio,
        windows=config.get("n_windows", 8),
        shortcut=config.get("short_cut", False),
        reduction=config.get("reduction", 1),
    ).eval()
    given = {"proj.weight": linear(vector, f"{name}.conv_out", "weight")}
    for entry in ("weight", "bias"):
        given[f"q.{entry}"] = linear(vector, f"{name}.theta", entry)
        parts = [linear(vector, f"{name}.{part}", entry) for part in ("phi", "g")]
        given[f"kv.{entry}"] = torch.cat(parts)
    rename = {
        f"ds.{index}.conv": "embed.1",
        f"ds.{index}.bn": "embed.2",
        f"{name}.conv_out.bn": "norm",
    }
    counters = ("embed.2.num_batches_tracked", "norm.num_batches_tracked")
    vector.load(module, rename=rename, given=given, keep=counters)
    return module


def branches(vector):
    x = vector.input("x")
    grid, results = Grid(*x.shape[2:]), {}
    for index, ratio in enumerate(vector.config["ratios"]):
        module = branch(vector, index, ratio)
        out = module(x.flatten(2).transpose(1, 2), grid)
        results[f"out.scaled_r{ratio}"] = module.embed(x)
        results[f"out.vwa_r{ratio}"] = out.transpose(1, 2).unflatten(2, grid.sizes)
    return results


PARTS = {"branches*": branches}
