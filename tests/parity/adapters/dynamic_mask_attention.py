"""The authors' operator with a bias per pair, and the attention layer of their Doge."""

from foveate.mechanisms.routed.dynamic_mask_attention import (
    DynamicMaskAttention,
    dynamic_mask_attention,
    select_kept,
)


def op(vector):
    config = vector.config
    q, k, v, bias = (vector.input(name) for name in ("query", "key", "value", "attn_bias"))
    causal = config.get("is_causal", True)
    visible = vector.take("in.causal_mask").bool() if vector.has("in.causal_mask") else None
    options = {
        "window": config["window_size"],
        "smooth": config.get("block_size") or 1,
        "keep": config.get("type", "topk"),
        # A mask that was given says who comes before whom.
        "causal": causal and visible is None,
        "visible": visible if causal else None,
    }
    out = dynamic_mask_attention(q, k, v, bias, scale=config["scaling"], **options)
    results = {"out.out": out.transpose(1, 2)}
    if vector.has("out.attn_mask"):
        where, _ = select_kept(bias, q.shape[2], **options)
        results["out.attn_mask"] = where.dense().expand(bias.shape)
    return results


def doge(vector):
    config = vector.config
    module = DynamicMaskAttention(
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        width=config.get("head_dim"),
        window=config["keep_window_size"],
        base=config.get("rope_theta", 10000.0),
        bias=vector.has("param.q_proj.bias"),
    ).eval()
    vector.load(module, rename={"o_proj": "proj"})
    x = vector.input("hidden_states")
    visible = vector.take("in.attention_mask") == 0 if vector.has("in.attention_mask") else None
    # The angles come from positions 0, 1, ... and the base; ours are made of the same.
    vector.take("in.cos"), vector.take("in.sin")
    results = {"out.out": module.prefill(x, visible=visible)[0]}
    if vector.has("out.attn_weights"):
        results["out.attn_weights"] = module.maps(x, visible=visible)
    return results


PARTS = {"op*": op, "doge*": doge}
