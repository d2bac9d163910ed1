"""InfSA's attention module, both variants; our names. `official`, as rho gets no gradient there."""

from foveate.mechanisms.scored.infinite_self_attention import InfiniteSelfAttention


def attention(vector):
    config = vector.config
    module = InfiniteSelfAttention(
        dim=config["embed_dim"],
        heads=config["num_heads"],
        variant=config.get("variant", "pure_infsa").removesuffix("_infsa"),
        rho=config.get("rho_init", 0.95),
        rho_trainable=config.get("rho_trainable", True),
        bias=config.get("bias", True),
        official=True,
    ).eval()
    vector.load(module)
    query, key, value = (vector.input(name) for name in ("query", "key", "value"))
    outs = {"out.out": module.read(query, key, value), "out.weights": module.weights(query, key)}
    return {name: out for name, out in outs.items() if vector.has(name)}


PARTS = {"pure*": attention, "linear*": attention}
