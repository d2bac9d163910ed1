"""Key-driven GQA: names are ours; DGQA is stepped through its training windows and one evaluation."""

from foveate.core.grid import Grid
from foveate.mechanisms.projections import split_heads
from foveate.mechanisms.scored.key_driven_gqa import KeyDrivenAttention, convert, key_norms


def build(vector, groups):
    config = vector.config
    module = KeyDrivenAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        kv_heads=config.get("num_kv_heads"),
        groups=groups,
        ratio=config.get("kind", "diff"),
        window=config.get("window_size", 1),
        qkv_bias=config.get("qkv_bias", False),
        official=True,
    )
    vector.load(module, keep=("sizes", "steps"))
    return module


def grouped(vector, groups):
    module = build(vector, groups).eval()
    x = vector.input("x")
    results = {"out": module(x, Grid(x.shape[1]))}
    k = split_heads(module.k(x), module.kv_heads)
    if vector.has("out.k_norms"):
        results["out.k_norms"] = key_norms(k)
    if vector.has("out.q_allocations"):
        results["out.q_allocations"] = module.allocate(k).to(vector.take("out.q_allocations").dtype)
    if vector.has("conv.in.qkv_weight"):
        bias = vector.take("conv.in.qkv_bias") if vector.has("conv.in.qkv_bias") else None
        made = convert(vector.take("conv.in.qkv_weight"), bias, module.heads, module.kv_heads)
        results.update({f"conv.out.{name}": value for name, value in made.items()})
    return results


def gqa(vector):
    return grouped(vector, "gqa")


def kdgqa(vector):
    return grouped(vector, "kdgqa")


def dgqa(vector):
    config, module, results = vector.config, build(vector, "dgqa"), {}
    cases = [name for name in vector.names("out") if "." not in name]
    steps = sorted(name for name in cases if name != "eval")
    for index, name in enumerate([*steps, "eval"]):
        x = vector.input(f"x{index}")
        module.train(name != "eval")
        # Every training call falls on the end of a window.
        results[f"out.{name}"] = module(x, Grid(x.shape[1]), step=config["window_size"])
        for kept, buffer in (("splits", module.sizes), ("cache", module.cache)):
            if vector.has(f"out.{name}.{kept}"):
                results[f"out.{name}.{kept}"] = buffer.clone()
    return results


PARTS = {"gqa*": gqa, "kdgqa*": kdgqa, "dgqa*": dgqa}
