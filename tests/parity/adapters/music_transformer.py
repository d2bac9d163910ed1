"""Music Transformer: tensor2tensor's attention functions; queries come scaled, tables have distance 0 last."""

from foveate.mechanisms.scored.music_transformer import relative_attention


def attention(vector):
    config = vector.config
    q, k, v = (vector.input(name) for name in ("q", "k", "v"))
    name = "relative_embeddings" if vector.has("param.relative_embeddings") else "key_relative_embeddings"
    table = vector.param(name)
    values = vector.param("value_relative_embeddings") if config["add_relative_to_values"] else None
    mask = vector.input("bias") if vector.has("in.bias") else None
    out = relative_attention(
        q,
        k,
        v,
        table,
        values,
        causal="unmasked" not in config["fn"],
        block=config.get("block_length"),
        mask=mask,
        scale=1.0,
        official=True,
    )
    return {"out": out}


PARTS = {"relative_v2*": attention, "unmasked_v2*": attention, "local*": attention}
