"""GAAM: one parameter per head and Gaussian is a row of ours; padding and division are the authors'."""

import torch

from foveate.mechanisms.scored.gaussian_adaptive_attention import GaussianBlock, GaussianHeads


def rows(vector, heads, prefix=""):
    stacked = {}
    for ours, theirs in (("offsets", "mean_offsets"), ("widths", "c")):
        each = [vector.param(f"{prefix}attention_heads.{head}.{theirs}") for head in range(heads)]
        stacked[f"{prefix}{ours}"] = torch.stack(each)
    return stacked


def options(config):
    return {"padding": config.get("padding_value"), "eps": config.get("eps", 1e-8), "official": True}


def mhgaa(vector):
    config = vector.config
    module = GaussianHeads(
        axis=config["norm_axis"],
        heads=config["num_heads"],
        gaussians=config["num_gaussians"],
        **options(config),
    )
    vector.load(module, given=rows(vector, config["num_heads"]))
    x = vector.input("x")
    results = {"out": module(x)}
    if vector.has("out.mixture"):
        results["out.mixture"] = module.weights(x)
    return results


def block(vector):
    config = vector.config
    module = GaussianBlock(
        axes=config["norm_axes"],
        heads=config["num_heads"],
        gaussians=config["num_gaussians"],
        **options(config),
    )
    given = {}
    for index, heads in enumerate(config["num_heads"]):
        given.update(rows(vector, heads, f"layers.{index}."))
    vector.load(module, given=given)
    return {"out": module(vector.input("x"))}


PARTS = {"mhgaa*": mhgaa, "block*": block}
