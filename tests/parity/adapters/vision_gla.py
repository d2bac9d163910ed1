"""ViG's layer and block, and flash-linear-attention's plain gated recurrence (B, T, H, D) -> ours."""

import torch

from foveate.core.grid import Grid
from foveate.kernels.scan.api import scan
from foveate.mechanisms.linear.vision_gla import VisionGLA, VisionGLABlock

NAMES = {
    "in_proj.0": "conv",
    "qkv_proj": "qkv",
    "gk_proj": "forget",
    "g_proj": "gate",
    "g_norm": "norm",
    "l_norm": "local_norm",
    "o_proj": "proj",
}


def mixer_of(config, dim, heads, eps):
    return VisionGLA(
        dim=dim,
        heads=heads,
        expand_k=config.get("expand_k", 0.5),
        rank=config.get("gate_low_rank_dim", 16),
        normalizer=config.get("gate_logit_normalizer", 16),
        floor=config.get("clamp_min"),
        eps=eps,
        out_act=config.get("use_out_act", False),
        conv_act=config.get("use_act_in_conv", True),
        conv_bias=config.get("use_bias_in_dwconv", False),
        official=True,
    ).train(config.get("training", False))


def layer(vector):
    config = vector.config
    module = mixer_of(config, config["d_model"], config["num_heads"], config.get("layernorm_eps", 1e-5))
    vector.load(module, rename=NAMES)
    return {"out": module(vector.input("x"), Grid(config["H"], config["W"]))}


def block(vector):
    config = vector.config
    mixer = mixer_of(
        config, config["hidden_size"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    )
    module = VisionGLABlock(
        mixer=mixer,
        act={"swish": "silu"}.get(config["hidden_act"], config["hidden_act"]),
        swiglu=config["use_swiglu"],
        layer_scale=config["init_values"],
    ).train(config.get("training", False))
    given = {}
    if config["init_values"] is not None:
        given["scales"] = torch.stack([vector.param("gamma1"), vector.param("gamma2")])
    fc = {"mlp.gate_proj": "fc1", "mlp.down_proj": "fc2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    names = {f"attn.{theirs}": f"mixer.{ours}" for theirs, ours in NAMES.items()}
    vector.load(module, rename=names | fc | {"attn_norm": "norm1", "mlp_norm": "norm2"}, given=given)
    return {"out": module(vector.input("x"), Grid(config["H"], config["W"]))}


def recurrence(vector):
    q, k, v, decay = (vector.input(name).transpose(1, 2) for name in ("q", "k", "v", "gk"))
    state = vector.input("initial_state") if vector.has("in.initial_state") else None
    scale = vector.config.get("scale") or vector.input("q").shape[-1] ** -0.5
    out, last = scan(q, k, v, decay=decay, scale=scale, initial_state=state, return_state=True)
    if vector.has("cotangent"):
        vector.seed("cotangent", "out.o")
    both = {"out.o": out.transpose(1, 2), "out.final_state": last}
    return {name: value for name, value in both.items() if vector.has(name)}


PARTS = {"gla*": layer, "block*": block, "fla_gla*": recurrence}
