"""The released models' attention and decoder layer (B, N, E) -> ours."""

from foveate.mechanisms.linear.transnormer_llm import NormLinearAttention, TransNormerLayer

MIXER = {"qkvu_proj": "qkvu", "out_proj": "proj", "lrpe.theta": "theta"}
LAYER = {f"token_mixer.{theirs}": f"mixer.{ours}" for theirs, ours in MIXER.items()}


def options(vector, prefix=""):
    config = vector.config
    return {
        "dim": config["embed_dim"],
        "width": config.get("hidden_dim", config["embed_dim"]),
        "heads": config["num_heads"],
        "lrpe": config.get("linear_use_lrpe", False),
        "layer": config.get("layer_idx", 0),
        "layers": config.get("num_layers", 1),
        "bias": vector.has(f"param.{prefix}qkvu_proj.bias"),
    }


def run(vector, module, mixer):
    if vector.has("in.slope_rate"):
        # Their caller hands the slopes in.
        mixer.slopes = vector.input("slope_rate").flatten()
    present = None
    if vector.has("in.attn_padding_mask"):
        present = vector.take("in.attn_padding_mask").bool()
    return {"out": module.prefill(vector.input("x"), present=present)[0]}


def attention(vector):
    module = NormLinearAttention(**options(vector))
    vector.load(module, rename=MIXER)
    return run(vector, module, module)


def layer(vector):
    hidden = vector.config.get("glu_dim", -1)
    module = TransNormerLayer(**options(vector, "token_mixer."), hidden=hidden if hidden > 0 else None)
    vector.load(module, rename={**LAYER, "channel_mixer": "mlp"})
    return run(vector, module, module.mixer)


PARTS = {"attn*": attention, "layer*": layer}
