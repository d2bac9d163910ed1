"""CATANet: maps (B, C, H, W) <-> tokens; the 1x1 convolution is a linear map; centres are buffers of the block."""

from foveate.core.grid import Grid
from foveate.mechanisms.routed.catanet import PatchBlock, TokenAggregationBlock


def tab(vector):
    config = vector.config
    module = TokenAggregationBlock(
        dim=config["dim"],
        heads=config["heads"],
        mlp_dim=config["mlp_dim"],
        qk_dim=config["qk_dim"],
        clusters=config["num_tokens"],
        group=config["group_size"],
        iterations=config["n_iter"],
        decay=config.get("ema_decay", 0.999),
        official=True,
    ).train(config.get("training", False))
    rename = {
        "norm": "norm1",
        "means": "attn.centres.means",
        "initted": "attn.centres.initted",
        "iasa_attn": "attn",
        "irca_attn.to_k": "attn.centre_k",
        "irca_attn.to_v": "attn.centre_v",
        "mlp.norm": "norm2",
        "mlp.fn": "ffn",
        "mlp.fn.dwconv.depthwise_conv.0": "ffn.conv",
    }
    vector.load(module, rename=rename, given={"mix.weight": vector.param("conv1x1.weight").flatten(1)})
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    # The authors' sort is unstable, so that the order of ties differs between machines. Theirs is handed over
    # where it is stored, and refused by our module unless it sorts the tokens by our own nearest centres.
    order = vector.take("out.idx_last").squeeze(-1) if vector.has("out.idx_last") else None
    out, order = module.forward_sorted(x.flatten(2).transpose(1, 2), grid, order=order)
    results = {
        "out": out.transpose(1, 2).unflatten(2, grid.sizes),
        "out.out": out.transpose(1, 2).unflatten(2, grid.sizes),
        "out.idx_last": order.unsqueeze(-1),
        "out.means_after": module.attn.centres.means,
        "out.initted_after": module.attn.centres.initted,
    }
    return {name: value for name, value in results.items() if vector.has(name)}


def lrsa(vector):
    config = vector.config
    module = PatchBlock(
        dim=config["dim"],
        heads=config["heads"],
        mlp_dim=config["mlp_dim"],
        qk_dim=config["qk_dim"],
        patch=config["ps"],
        official=True,
    ).eval()
    rename = {
        "layer.0.norm": "norm1",
        "layer.0.fn": "",
        "layer.1.norm": "norm2",
        "layer.1.fn": "ffn",
        "layer.1.fn.dwconv.depthwise_conv.0": "ffn.conv",
    }
    vector.load(module, rename=rename)
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid)
    return {"out": out.transpose(1, 2).unflatten(2, grid.sizes)}


PARTS = {"tab*": tab, "lrsa*": lrsa}
