"""BiFormer's attention, channels last and channels first, and its block: (B, H, W, C) <-> (B, N, C)."""

from foveate.core.grid import Grid
from foveate.mechanisms.routed.biformer import BiFormerBlock, BiLevelRoutingAttention


def options(config):
    return {
        "dim": config["dim"],
        "heads": config["num_heads"],
        "regions": config["n_win"],
        "topk": config["topk"],
        "local_kernel": config["side_dwconv"],
    }


def bra(vector):
    module = BiLevelRoutingAttention(official="tokens", **options(vector.config)).eval()
    vector.load(module, rename={"qkv.qkv": "qkv", "wo": "proj"})
    x = vector.input("x")
    grid = Grid(*x.shape[1:3])
    out, weights, chosen = module.forward_routed(x.flatten(1, 2), grid)
    results = {"out.out": out.unflatten(1, grid.sizes), "out.r_weight": weights, "out.r_idx": chosen}
    return {name: value for name, value in results.items() if vector.has(name)} | (
        {"out": results["out.out"]} if vector.has("out") else {}
    )


def nchw(vector):
    module = BiLevelRoutingAttention(official="keys", **options(vector.config)).eval()
    given = {
        "qkv.weight": vector.param("qkv_linear.weight").flatten(1),
        "proj.weight": vector.param("output_linear.weight").flatten(1),
    }
    vector.load(
        module, rename={"qkv_linear.bias": "qkv.bias", "output_linear.bias": "proj.bias"}, given=given
    )
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid)
    return {"out": out.transpose(1, 2).unflatten(2, grid.sizes)}


def block(vector):
    config = vector.config
    module = BiFormerBlock(mlp_ratio=config["mlp_ratio"], official="tokens", **options(config)).eval()
    rename = {"attn.qkv.qkv": "attn.qkv", "attn.wo": "attn.proj", "mlp.3": "mlp.2"}
    vector.load(module, rename=rename)
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid)
    return {"out": out.transpose(1, 2).unflatten(2, grid.sizes)}


PARTS = {"bra*": bra, "nchw*": nchw, "block*": block}
