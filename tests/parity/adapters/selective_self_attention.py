"""SSA's position temperature: the fused projection holds, group after group, its queries, key and value."""

from foveate.core.grid import Grid
from foveate.mechanisms.scored.selective_self_attention import SelectiveSelfAttention


def pts(vector):
    config = vector.config
    heads = config["n_head"]
    groups = config.get("n_query_groups") or heads
    width = config.get("head_size") or config["n_embd"] // heads
    rotated = config.get("rope_n_elem", 0)
    module = SelectiveSelfAttention(
        dim=config["n_embd"],
        heads=heads,
        kv_heads=groups,
        width=width,
        causal=True,
        tokens=(),
        position="double_exp" if "exp(-exp" in vector.call else "linear",
        rotary_dims=rotated,
        base=config.get("rope_base", 10000.0),
        bias=config.get("bias", True),
    ).eval()
    given = {}
    for kind in ("weight", "bias"):
        if vector.has(f"param.attn.{kind}"):
            fused = vector.param(f"attn.{kind}").unflatten(0, (groups, -1, width))
            each = heads // groups
            given[f"q_proj.{kind}"] = fused[:, :each].flatten(0, 2)
            given[f"k_proj.{kind}"] = fused[:, each].flatten(0, 1)
            given[f"v_proj.{kind}"] = fused[:, each + 1].flatten(0, 1)
    vector.load(module, rename={"beta": "position.beta"}, given=given)
    for name in ("cos", "sin"):
        # Angles of positions 0, 1, ...; ours are made of the same.
        if vector.has(f"in.{name}"):
            vector.take(f"in.{name}")
    x = vector.input("x")
    return {"out": module(x, Grid(x.shape[1]))}


PARTS = {"pts*": pts, "": pts}
