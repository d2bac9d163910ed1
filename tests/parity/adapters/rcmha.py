"""RCMHA's attention: time comes first; keys and values are handed over with the memory in front."""

from foveate.core.grid import Grid
from foveate.mechanisms.scored.rcmha import RelativeConvolutionalAttention

NAMES = {
    "query.0.linear": "query",
    "key.0.linear": "key",
    "value.0.linear": "value",
    "query.1.conv": "query_conv",
    "key.1.conv": "key_conv",
    "value.1.conv": "value_conv",
    "output": "proj",
    "key_pos_embeddings": "table",
    "key_pos_bias": "offset_bias",
    "query_pos_bias": "query_bias",
}


def attention(vector):
    config = vector.config
    table = vector.take("param.key_pos_embeddings")
    module = RelativeConvolutionalAttention(
        dim=config["d_model"],
        heads=config["heads"],
        max_distance=table.shape[0] // 2,
        kernel=vector.take("param.query.1.conv.weight").shape[-1],
        causal=False,
        official=True,
    ).eval()
    vector.load(module, rename=NAMES)
    x = vector.input("query").transpose(0, 1)
    options = {}
    if vector.has("in.mem"):
        options["memory"] = vector.input("mem").transpose(0, 1)
    if vector.has("in.mask"):
        options["mask"] = vector.take("in.mask").permute(2, 0, 1).unsqueeze(1).bool()
    results = {"out": module(x, Grid(x.shape[1]), **options).transpose(0, 1)}
    if vector.has("out.attn"):
        results["out.attn"] = module.attention_map(x, **options).permute(2, 3, 0, 1)
    return results


PARTS = {"attention*": attention}
