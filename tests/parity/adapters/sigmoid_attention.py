"""The simulator's classes: buffers attn_bias and attn_temp live in our `weigh`; positions by class."""

from foveate.mechanisms.scored.sigmoid_attention import SigmoidAttention, SigmoidCrossAttention

ROW_SCALES = {"sqrt_seq_len_normalized_": "sqrt", "seq_len_normalized_": "length", "": "none"}
POSITIONS = {"Attention": "none", "ALiBiAttention": "alibi", "RoPEAttention": "rope"}
RENAME = {"attn_bias": "weigh.attn_bias", "attn_temp": "weigh.attn_temp"}


def options(config):
    function = config["attn_activ_fn"]
    activation = "softmax" if function.endswith("softmax") else "sigmoid"
    return {
        "dim": config.get("q_dim", config["dim"]),
        "heads": config["num_heads"],
        "qkv_bias": config["bias"],
        "qk_norm": config["qk_norm"],
        "logit_bias": config["attn_bias"] or 0.0,
        "temperature": config["attn_temp"] or 0.0,
        "activation": activation,
        "row_scale": ROW_SCALES[function.removesuffix(activation)],
    }


def attention(vector):
    config = vector.config
    position, causal = POSITIONS[config["cls"]], config["causal_mask"]
    module = SigmoidAttention(position=position, causal=causal, **options(config)).eval()
    vector.load(module, rename=RENAME)
    x = vector.input("x")
    return {"out.attn_matrix": module.attention_map(x), "out.attn_proj": module(x)}


def cross(vector):
    module = SigmoidCrossAttention(kv_dim=vector.config["kv_dim"], **options(vector.config)).eval()
    vector.load(module, rename=RENAME)
    inputs = vector.input("q"), vector.input("kv")
    return {"out.attn_matrix": module.attention_map(*inputs), "out.attn_proj": module(*inputs)}


PARTS = {"attention*": attention, "alibi*": attention, "rope*": attention, "cross*": cross}
