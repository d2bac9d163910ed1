"""Swin: windows varying fastest in the batch, tables ((2M-1)^2, heads), buffers in the checkpoint."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.swin import SwinBlock, WindowAttention, relative_position_index, window_tokens


def table(vector, name, sides):
    """The authors' flat table as ours: heads first, one axis per window axis."""
    return vector.param(name).reshape(*sides, -1).permute(2, 0, 1)


def window_attention(vector):
    config = vector.config
    window = tuple(config["window_size"])
    sides = (2 * window[0] - 1, 2 * window[1] - 1)
    prefix = "attn." if vector.has("param.attn.qkv.weight") else ""
    name = f"{prefix}relative_position_bias_table"
    module = WindowAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        window=window,
        qkv_bias=config.get("qkv_bias", True),
        scale=config.get("qk_scale"),
    )
    vector.load(module, prefix=prefix, given={"position.table": table(vector, name, sides)})
    x = vector.input("x")
    mask = None
    if vector.has("param.mask"):
        mask = vector.take("param.mask")
        mask = mask.expand(x.shape[0] // mask.shape[0], *mask.shape).flatten(0, 1).unsqueeze(1)
    return {
        "out": module(x, Grid(*window), mask=mask),
        f"param.{prefix}relative_position_index": relative_position_index(window),
    }


def block(vector):
    config = vector.config
    grid = Grid(*config["input_resolution"])
    fits = min(grid) > config["window_size"]
    window = (min(config["window_size"], *grid),) * grid.ndim
    shift = config.get("shift_size", 0) if fits else 0
    module = SwinBlock(
        dim=config["dim"],
        heads=config["num_heads"],
        window=window,
        shift=shift,
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        scale=config.get("qk_scale"),
    )
    sides = (2 * window[0] - 1, 2 * window[1] - 1)
    given = {"attn.position.table": table(vector, "attn.relative_position_bias_table", sides)}
    vector.load(module, rename={"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}, given=given)
    results = {
        "out": module(vector.input("x"), grid),
        "param.attn.relative_position_index": relative_position_index(window),
    }
    if vector.has("param.attn_mask"):
        ids = window_tokens(grid, window, (shift,) * grid.ndim)
        seen = module.attn.where(grid).dense()
        results["param.attn_mask"] = seen[ids[:, :, None], ids[:, None, :]]
    return results


PARTS = {"window_attention*": window_attention, "block*": block}
