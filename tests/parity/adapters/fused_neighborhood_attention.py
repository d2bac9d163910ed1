"""NATTEN's functions, heads last: (B, *layout, H, D) <-> (B, H, N, D)."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.fused_neighborhood_attention import neighborhood_attention
from foveate.patterns.grids import Neighborhood


def heads_first(x):
    return x.flatten(1, -3).transpose(1, 2)


def generic(vector):
    config = vector.config
    grid = Grid(*vector.input("query").shape[1:-2])
    where = Neighborhood(
        grid,
        config["kernel_size"],
        dilation=config.get("dilation", 1),
        stride=config.get("stride", 1),
        causal=config.get("is_causal", False),
    )
    tensors = {name: heads_first(tensor) for name, tensor in vector.inputs().items()}
    out, lse = neighborhood_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        where,
        additional_keys=tensors.get("additional_keys"),
        additional_values=tensors.get("additional_values"),
        scale=config.get("scale"),
        return_lse=True,
    )
    results = {"out.output": out.transpose(1, 2).unflatten(1, grid.sizes)}
    if vector.has("out.lse"):
        results["out.lse"] = lse.transpose(1, 2).unflatten(1, grid.sizes)
    if vector.has("mask.allowed"):
        results["mask.allowed"] = where.dense()
    return results


PARTS = {"": generic, "additional_kv*": generic}
