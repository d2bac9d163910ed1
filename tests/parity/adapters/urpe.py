"""URPE: time comes first; the attention is handed its maps, one per sample and head."""

import torch

from foveate.core.grid import Grid
from foveate.mechanisms.scored.urpe import UniversalEncoder, UniversalRelativeAttention
from foveate.scores.after import Multiply
from foveate.scores.bias import Bias
from foveate.scores.buckets import ClippedOffsets, SignedBuckets, bucket_map


def projections(vector, theirs, ours):
    """Put the three projections of the authors on top of each other."""
    parts = ("weight", "bias") if vector.has(f"param.{theirs}q_proj.bias") else ("weight",)
    return {
        f"{ours}qkv.{part}": torch.cat([vector.param(f"{theirs}{x}_proj.{part}") for x in "qkv"])
        for part in parts
    }


def attention(vector):
    config = vector.config
    heads = config["num_heads"]
    module = UniversalRelativeAttention(dim=config["embed_dim"], heads=heads, tables=False).eval()
    vector.load(module, rename={"out_proj": "proj"}, given=projections(vector, "", ""))
    score = after = None
    if vector.has("in.rel_pos_bias"):
        score = Bias(vector.input("rel_pos_bias").unflatten(0, (-1, heads)))
    if vector.has("in.ur_rel_pos_bias"):
        after = Multiply(vector.input("ur_rel_pos_bias").unflatten(0, (-1, heads)))
    x = vector.input("x").transpose(0, 1)
    return {"out": module(x, Grid(x.shape[1]), position=(score, after)).transpose(0, 1)}


def buckets(config, kind, count, reach, unique):
    if not config.get(kind, True):
        return None
    length = config["max_seq_len"]
    if config.get(unique, False):
        return ClippedOffsets(length - 1)
    return SignedBuckets(config.get(count, 64), config.get(reach, 128), gap=2, length=length)


def encoder(vector):
    config = vector.config
    bias = buckets(config, "rel_pos", "rp_bucket", "max_rp", "rel_pos_unique")
    factor = buckets(config, "ur_attn", "ur_rp_bucket", "ur_max_rp", "ur_attn_unique")
    depth = config["num_encoder_layers"]
    module = UniversalEncoder(
        vocab=config["vocab_size"],
        dim=config["embedding_dim"],
        heads=config["num_attention_heads"],
        depth=depth,
        hidden=config["ffn_embedding_dim"],
        padding=config["padding_idx"],
        bias=bias,
        factor=factor,
        embedding_norm=config.get("encoder_normalize_before", False),
        activation=config.get("activation_fn", "relu"),
    ).eval()
    given, rename = {}, {"embed_tokens": "embed", "emb_layer_norm": "norm"}
    if bias is not None:
        given["position.bias"] = vector.param("rp_bias.weight").transpose(0, 1)
    if factor is not None:
        given["position.factor"] = vector.param("ur_rp_bias.weight").transpose(0, 1)
    for i in range(depth):
        layer = f"layers.{i}."
        given.update(projections(vector, f"{layer}self_attn.", f"{layer}attention."))
        names = {
            f"{layer}self_attn.out_proj": f"{layer}attention.proj",
            f"{layer}self_attn_layer_norm": f"{layer}attention_norm",
            f"{layer}fc1": f"{layer}mlp.0",
            f"{layer}fc2": f"{layer}mlp.2",
            f"{layer}final_layer_norm": f"{layer}mlp_norm",
        }
        rename.update(names)
    vector.load(module, rename=rename, given=given)
    out = module(vector.take("in.tokens"))
    results = {"out.last_state": out.transpose(0, 1), "out.sentence_rep": out[:, 0]}
    for name, rule in (("out.bucket", bias), ("out.ur_bucket", factor)):
        if rule is not None and vector.has(name):
            results[name] = bucket_map(rule, config["max_seq_len"])
    return results


PARTS = {"attention*": attention, "encoder*": encoder}
