"""MoH in DiT, LLaMA and TransNeXt: its router's three maps, and the names of its hosts."""

from foveate.core.grid import Grid
from foveate.mechanisms.projections import split_heads
from foveate.mechanisms.scored.mixture_of_heads import (
    MixtureOfAggregatedHeads,
    MixtureOfCosineHeads,
    MixtureOfHeads,
    NormRoutedHeads,
)

ROUTER = {"wg": "router.to_routed", "wg_1": "router.to_shared", "wg_0": "router.to_balance"}


def dit(vector):
    config = vector.config
    module = MixtureOfHeads(
        dim=config["dim"],
        heads=config["num_heads"],
        shared=config.get("shared_head", 0),
        routed=config.get("routed_head", 0),
        width=config.get("head_dim"),
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_norm", False),
    ).eval()
    vector.load(module, rename=ROUTER)
    x = vector.input("x")
    results = {"out": module(x, Grid(x.shape[1]))}
    if vector.has("out.load_balancing_loss"):
        results["out.load_balancing_loss"] = module.router(x).balance
    return results


def llama(vector):
    config = vector.config
    module = NormRoutedHeads(
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        shared=config["shared_head"],
        routed=config["routed_head"],
        width=config.get("head_dim"),
        base=config.get("rope_theta", 10000.0),
        bias=config.get("attention_bias", False),
    ).eval()
    vector.load(module, rename={"o_proj": "proj"})
    x = vector.input("hidden_states")
    results = {"out": module(x, Grid(x.shape[1]))}
    if vector.has("out.routed_mask"):
        chosen, _ = module.choose(split_heads(module.q_proj(x), module.heads))
        results["out.routed_mask"] = chosen.to(vector.take("out.routed_mask").dtype)
    return results


def host(vector, kind, rename, **options):
    config = vector.config
    module = kind(
        dim=config["dim"],
        heads=config["num_heads"],
        shared=config["shared_head"],
        routed=config["routed_head"],
        qkv_bias=config.get("qkv_bias", True),
        **options,
    ).eval()
    vector.load(module, rename={**ROUTER, "cpb_fc1": "cpb.fc1", "cpb_fc2": "cpb.fc2", **rename})
    for name in vector.names("buffer"):
        vector.take(f"buffer.{name}")  # made from the resolution and the window, as ours are
    positions = vector.input("relative_coords_table"), vector.take("in.relative_pos_index")
    return {"out": module(vector.input("x"), Grid(*config["input_resolution"]), positions=positions)}


def vit_attention(vector):
    return host(vector, MixtureOfCosineHeads, {})


def vit_aggregated(vector):
    config = vector.config
    fixed = config.get("fixed_pool_size")
    sides = [fixed, fixed] if isinstance(fixed, int) else fixed
    names = {
        "relative_pos_bias_local": "local_bias",
        "learnable_tokens": "local_tokens",
        "learnable_bias": "local_weights",
    }
    options = {"window": config["window_size"], "pool": Grid(*sides) if fixed else config["sr_ratio"]}
    return host(vector, MixtureOfAggregatedHeads, names, **options)


PARTS = {
    "dit*": dit,
    "llama*": llama,
    "vit_attention*": vit_attention,
    "vit_aggregated*": vit_aggregated,
}
