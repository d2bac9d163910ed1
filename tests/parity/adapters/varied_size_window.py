"""VSA: 1 x 1 convolutions as linear maps, one flat bias table, constants of the sampling grid."""

from foveate.core.grid import Grid
from foveate.mechanisms.local.swin import relative_position_index
from foveate.mechanisms.local.varied_size_window import VariedSizeWindowAttention, reference_points


def attention(vector):
    config = vector.config
    side = config["window_size"]
    x = vector.input("x")
    grid = Grid(*x.shape[2:])
    module = VariedSizeWindowAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        window=side,
        out_dim=config.get("out_dim"),
        qkv_bias=config.get("qkv_bias", True),
        # The authors take the head width of the input, which differs when out_dim does.
        scale=config.get("qk_scale") or (config["dim"] // config["num_heads"]) ** -0.5,
    ).eval()
    convolutions = {
        "qkv": "qkv",
        "offsets": "sampling_offsets.2",
        "scales": "sampling_scales.2",
        "proj": "proj",
    }
    given = {
        f"{ours}.weight": vector.param(f"{official}.weight").flatten(1)
        for ours, official in convolutions.items()
    }
    table = vector.param("relative_position_bias_table")
    given["position.table"] = table.reshape(2 * side - 1, 2 * side - 1, -1).permute(2, 0, 1)
    rename = {f"{official}.bias": f"{ours}.bias" for ours, official in convolutions.items()}
    vector.load(module, rename=rename, given=given)
    out = module(x.flatten(2).transpose(1, 2), grid)
    results = {"out": out.transpose(1, 2).unflatten(2, grid.sizes)}
    base, coords = reference_points(grid, (side, side))
    buffers = {
        "param.base_coords": base,
        "param.coords": coords,
        "param.relative_position_index": relative_position_index((side, side)),
    }
    return results | {name: value for name, value in buffers.items() if vector.has(name)}


PARTS = {"": attention, "*": attention}
