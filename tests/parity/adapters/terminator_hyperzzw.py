"""Terminator's global operator, hyper-interaction and multi-branch layer; sizes of slow networks from their weights."""

from foveate.mechanisms.gated.terminator_hyperzzw import Interact, TerminatorLayer, hyper_global
from foveate.mechanisms.magnet import Magnet

NAMES = {
    "fast_reduce": "reduce",
    "fast_fc1": "fc",
    "fast_linears_x": "factors",
    "bias_p": "bias",
    "bias_pk": "bias",
}


def slow(vector, theirs, ours):
    """Hidden channels and multiplications of a slow network, and its names."""
    names = [
        name.removeprefix(f"{theirs}.") for name in vector.names("param") if name.startswith(f"{theirs}.")
    ]
    weights = [name for name in names if name.endswith(".weight")]
    layers = len([name for name in weights if name.startswith("linears.")])
    hidden = vector.take(f"param.{theirs}.output_linear.weight").shape[1]
    dot = f"{ours}." if ours else ""
    renames = {f"{theirs}": ours, **{f"{theirs}.{old}": f"{dot}{new}" for old, new in NAMES.items()}}
    for stem in (name.removesuffix(".linear.weight") for name in weights if name.startswith("filters.")):
        renames[f"{theirs}.{stem}.linear"] = f"{dot}{stem}"
    return hidden, layers, renames


def whole(vector):
    config, x = vector.config, vector.input("x")
    hidden, layers, renames = slow(vector, "Kernel", "")
    kernel = Magnet(sizes=(config["size"], config["size"]), hidden=hidden, out=x.shape[1], layers=layers)
    vector.load(kernel, rename=renames)
    return {"out.hyper_kernel": kernel(), "out.out": hyper_global(x, kernel(), vector.input("fast"))}


def interact(vector):
    config = vector.config
    hidden, layers, renames = slow(vector, "slow_net_gc.Kernel", "channels")
    space_hidden, space_layers, more = slow(vector, "slow_net_gs.Kernel", "space")
    module = Interact(
        dim=config["channel"],
        size=config["kernel_cfg_s"]["size"],
        hidden=hidden,
        layers=layers,
        space_hidden=space_hidden,
        space_layers=space_layers,
    )
    vector.load(module, rename={**renames, **more})
    x = vector.input("x") if vector.has("in.x") else None
    return {"out": module(vector.input("y"), x)}


PARTS_OF_LAYER = {
    "slow_net_g.Kernel": "kernel",
    "slow_net_l1.Kernel": "local.0.kernel",
    "channel_mixer_hci.slow_net_gc.Kernel": "picker.channels",
    "hyper_interact.slow_net_gc.Kernel": "gate.channels",
    "hyper_interact.slow_net_gs.Kernel": "gate.space",
}
GATES = {
    "fast_linear_k": "k",
    "fast_linear_v": "v",
    "fast_linear_q": "q",
    "fast_linear_y": "y",
    "fast_bias_p": "bias",
}


def layer(vector):
    config, x = vector.config, vector.input("x")
    dim, previous = config["in_channels"], config.get("num_concat_pre", 0)
    renames = {"channel_mixer_mlp": "mixer", "bottleneck_layer": "join"}
    found = [slow(vector, theirs, ours) for theirs, ours in PARTS_OF_LAYER.items()]
    for _, _, more in found:
        renames.update(more)
    for i, number in enumerate((1, 2, 3, 4)):
        renames.update(slow(vector, f"slow_net_l{number}.Kernel", f"local.{i}.kernel")[2])
        renames[f"local_interact_conv_{number}.channel_mixer"] = f"local.{i}.mix"
        renames[f"bias{number}"] = f"local.{i}.bias"
    for theirs, ours in (("Fast_Kernel_rgu", "rgu"), ("Fast_Kernel_rgu_2", "rgu_slow")):
        renames.update({f"{theirs}.{old}": f"{ours}.{new}" for old, new in GATES.items()})
    module = TerminatorLayer(
        dim=dim,
        size=config["size"],
        out=vector.take("param.bottleneck_layer.weight").shape[0],
        hidden=[hidden for hidden, _, _ in found],
        layers=[layers for _, layers, _ in found],
        kernels=config["local_kernel_sizes"],
        previous=previous,
        official=True,
    )
    for name in ("channel_mixer_mlp", "Fast_Kernel_rgu.fast_linear_y", "Fast_Kernel_rgu_2.fast_linear_y"):
        vector.take(f"param.{name}.bias")  # a norm takes it away again: ours has none
    for number in (1, 2, 3, 4):
        vector.take(f"param.local_interact_conv_{number}.channel_mixer.bias")
    constants = [name for name, _ in module.named_parameters() if name.endswith((".alpha", ".beta"))]
    vector.load(module, rename=renames, keep=tuple(constants))
    earlier = [vector.input(name) for name in ("x_pre", "x_pre_pre") if vector.has(f"in.{name}")]
    return {"out.out": module(x, *earlier), "out.hyper_kernel": module.kernel()}


PARTS = {"global*": whole, "interact*": interact, "fast_multi_branch*": layer}
