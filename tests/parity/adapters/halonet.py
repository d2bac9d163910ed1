"""HaloNet by timm's port: (B, C, H, W) <-> (B, N, C), 1 x 1 convolutions, kv ordered [k | v] inside each head."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.halonet import HaloAttention


def halo(vector):
    config = vector.config
    heads = config["num_heads"]
    x = vector.input("x")
    q, kv = vector.param("q.weight"), vector.param("kv.weight")
    head_dim = q.shape[0] // heads
    dim_out = kv.shape[0] - q.shape[0]
    module = HaloAttention(
        dim=config["dim"],
        heads=heads,
        block=config["block_size"],
        halo=config["halo_size"],
        stride=config.get("stride", 1),
        dim_out=dim_out,
        head_dim=head_dim,
        qkv_bias=config.get("qkv_bias", False),
        avg_down=config.get("avg_down", False),
        scale_position=config.get("scale_pos_embed", False),
        official=True,
    )
    sizes = [head_dim, dim_out // heads]
    given = {
        "q.weight": q.flatten(1),
        "rel.0": vector.param("pos_embed.height_rel"),
        "rel.1": vector.param("pos_embed.width_rel"),
    }
    for name, part in zip("kv", kv.flatten(1).unflatten(0, (heads, -1)).split(sizes, dim=1), strict=True):
        given[f"{name}.weight"] = part.flatten(0, 1)
    if config.get("qkv_bias", False):
        both = vector.param("kv.bias").unflatten(0, (heads, -1)).split(sizes, dim=1)
        given["q.bias"] = vector.param("q.bias")
        given.update({f"{name}.bias": part.flatten() for name, part in zip("kv", both, strict=True)})
    vector.load(module, given=given)
    grid = Grid(*x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid)
    return {"out": out.transpose(1, 2).unflatten(2, module.grid_out(grid).sizes)}


PARTS = {"": halo, "downsample*": halo}
